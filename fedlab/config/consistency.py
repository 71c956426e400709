"""What must hold between the sections of a configuration: one function per concern, each yielding what does not fit.

Nothing here reads data or asks a strategy; ``fedlab.run.launch`` goes on from here when both are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedlab.config.data import ClientsSection, DataSection
from fedlab.config.privacy import PrivacySection, quorum
from fedlab.config.sections import EvaluateSection, LoraSection, RunSection, StrategySection, TrainSection
from fedlab.config.tasks import StageSection, StreamSection, TaskSection

SHARED_SIGMA = (1e-4, 1e6)  # noise multipliers that are exact on the grid of shared noise
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


def training(run: RunSection, train: TrainSection, privacy: PrivacySection) -> Iterator[str]:
    """What is kept in memory fits how gradients are made, and a sampling rate has a plan that draws by it."""
    if train.sampling_rate is not None and privacy.unit != "example":
        yield (
            f'train.sampling_rate = {train.sampling_rate:g} with privacy.unit = "{privacy.unit}": without example-level'
            " DP batches have a fixed size; use train.batch_size"
        )
    if run.checkpointing and train.gradients != "fused":
        yield f'run.checkpointing = true needs train.gradients = "fused", got "{train.gradients}"'


def shared_noise(
    privacy: PrivacySection,
    train: TrainSection,
    clients: ClientsSection,
    strategy: StrategySection,
    drawn: int | None,
) -> Iterator[str]:
    """Clients whose shares of noise add up are all at one state, make one step of plain SGD each, at one rate; and two
    different sets of ``drawn`` clients (None: not known yet) can never both be confirmed.
    """
    if (fewest := privacy.survivors) is None:
        return
    if train.sampling_rate is None:
        yield (
            "train.sampling_rate is missing: under shared noise (privacy.survivors) all clients draw their records with"
            " one probability, since the noise of each must be enough for all; give it in place of train.batch_size"
        )
    if train.steps != 1:
        yield (
            f"train.steps = {train.steps} with privacy.survivors: what is summed are gradients at one state; set"
            " train.steps = 1"
        )
    plain: dict[str, tuple[object, object]] = {
        "train.optimizer": (train.optimizer, "sgd"),
        "train.momentum": (train.momentum, 0.0),
        "train.weight_decay": (train.weight_decay, 0.0),
        "train.prox": (train.prox, 0.0),
        "clients.lr": (clients.lr, {}),
        "strategy.weights": (strategy.weights, "examples"),
    }
    for key, (value, needed) in plain.items():
        if value != needed:
            yield (
                f"{key} = {value!r} with privacy.survivors: the server steps, on a sum of gradients that it cannot"
                f" take apart; set it to {needed!r} (momentum: strategy.server)"
            )
    if strategy.options.get("robust") is not None:
        yield (
            "strategy.robust with privacy.survivors: a robust rule looks at each client's update, and the server sees"
            " their sum alone; remove one of the two"
        )
    yield from _shares(privacy, fewest, drawn)


def _shares(privacy: PrivacySection, fewest: int, drawn: int | None) -> Iterator[str]:
    """A sum of at least two, of which no other set can be confirmed, with noise that its grid can carry."""
    low, high = SHARED_SIGMA
    if privacy.sigma is not None and not low <= privacy.sigma <= high:
        yield (
            f"privacy.sigma = {privacy.sigma:g} with privacy.survivors: noise that is shared is drawn in whole steps of"
            f" clip/2^20, from {low:g} to {high:g} times the clip; give a sigma between them"
        )
    if fewest < 2:
        yield (
            f"privacy.survivors = {fewest}: a sum over one client is that client's own; give at least 2, or leave"
            " survivors out, so that every client adds all of the noise itself"
        )
    elif drawn is not None:
        least = quorum(drawn, privacy.colluding)
        given = (
            f"privacy.survivors = {fewest} with {drawn} clients per round and privacy.colluding = {privacy.colluding}:"
        )
        if drawn < 2 or least > drawn:
            yield f"{given} too few are drawn for a sum; raise run.fraction or data.clients"
        elif not least <= fewest <= drawn:
            yield (
                f"{given} it must be at least {least}, so that no two sets of survivors can both be confirmed, and at"
                f" most {drawn}"
            )


def adapters(lora: LoraSection, clients: ClientsSection) -> Iterator[str]:
    """No client's adapter is larger than the server's."""
    for name, rank in clients.rank.items():
        if rank > lora.rank:
            yield f"clients.rank: {name} = {rank} exceeds lora.rank = {lora.rank}, the largest that the server keeps"
