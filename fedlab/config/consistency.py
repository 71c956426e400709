"""What must hold between the sections of a configuration: one function per concern, each yielding what does not fit.

Nothing here reads data or asks a strategy; ``fedlab.run.launch`` goes on from here when both are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedlab.config.data import ClientsSection, DataSection
from fedlab.config.privacy import PrivacySection
from fedlab.config.sections import EvaluateSection, LoraSection, RunSection, TrainSection
from fedlab.config.tasks import StageSection, StreamSection, TaskSection

SHARED_BY_TASKS = ("clients", "max_length")  # keys of [data] that no task may set for itself


def streams(
    tasks: Sequence[TaskSection], stream: StreamSection, stage: StageSection | None, data: DataSection
) -> Iterator[str]:
    """Tasks have names and data of their own; [stream] and [stage] belong to tasks."""
    names = [task.name.lower() for task in tasks]
    if len(set(names)) < len(names):
        twice = next(task.name for task in tasks if names.count(task.name.lower()) > 1)
        yield f"tasks: two are called {twice!r}; give each a name of its own"
    if not tasks and (stream != StreamSection() or stage is not None):
        yield "[stream] and [stage] belong to a configuration with [[tasks]]; add tasks or remove them"
    if tasks and stage is not None and stage.task >= len(tasks):
        yield f"stage.task = {stage.task}, but there are {len(tasks)} tasks, counted from 0"
    for task in tasks:
        DataSection.model_validate({**data.model_dump(), **task.data})
        if odd := sorted(task.data.keys() & set(SHARED_BY_TASKS)):
            yield f"tasks: {task.name} sets data.{odd[0]}, which all tasks share"


def memorisation(tasks: Sequence[TaskSection], data: DataSection, evaluate: EvaluateSection) -> Iterator[str]:
    """What is measured of the final model needs one run with one final model."""
    asked = {"data.canaries": data.canaries, "evaluate.membership": evaluate.membership}
    for key, value in asked.items():
        if tasks and value is not None:
            yield f"{key} with [[tasks]]: it is measured of the final model of one run, not of a stream; remove it"


def noised_scores(tasks: Sequence[TaskSection], privacy: PrivacySection, evaluate: EvaluateSection) -> Iterator[str]:
    """The charged release of clients' scores is made after the last round of one run."""
    if privacy.scores_sigma is not None and tasks:
        yield "privacy.scores_sigma with [[tasks]]: it is released once, of one run's final model; remove it"
    if privacy.scores_sigma is not None and evaluate.clients != "last":
        yield (
            f'privacy.scores_sigma with evaluate.clients = "{evaluate.clients}": clients are scored once, after the'
            ' last round; set evaluate.clients = "last"'
        )


def participation(run: RunSection, privacy: PrivacySection, clients: int | None, drawn: int) -> Iterator[str]:
    """Rounds can have the clients that they need; ``drawn`` of ``clients`` (None: not known yet) take part in one."""
    if run.sampling == "poisson" and privacy.unit != "client":
        yield (
            'run.sampling = "poisson" amplifies client-level DP only: participation is visible to the server; use'
            " balanced or uniform"
        )
    if clients is None:
        return
    if run.min_clients > drawn:
        yield (
            f"run.min_clients = {run.min_clients} can never be reached: {drawn} of {clients} clients are drawn per"
            " round"
        )
    cap = privacy.participations
    if cap is not None and cap * clients < run.min_clients:
        yield f"privacy.participations = {cap} cannot cover one round of {run.min_clients} clients"


def training(run: RunSection, train: TrainSection) -> Iterator[str]:
    """What is kept in memory fits how gradients are made."""
    if run.checkpointing and train.gradients != "fused":
        yield f'run.checkpointing = true needs train.gradients = "fused", got "{train.gradients}"'


def adapters(lora: LoraSection, clients: ClientsSection) -> Iterator[str]:
    """No client's adapter is larger than the server's."""
    for name, rank in clients.rank.items():
        if rank > lora.rank:
            yield f"clients.rank: {name} = {rank} exceeds lora.rank = {lora.rank}, the largest that the server keeps"
