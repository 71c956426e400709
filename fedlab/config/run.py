"""What a run is: frozen pydantic models read from TOML, saved with the run, unknown keys rejected.

Light on purpose: importing this module imports neither torch nor flwr, so that a misspelt key is reported at once.
The sections and their keys are in ``fedlab.config.sections``.
"""

from __future__ import annotations

from pathlib import Path

import tomli_w
from pydantic import model_validator

from fedlab.config.load import parse_model, read_text, without_none
from fedlab.config.sections import (
    ClientsSection,
    DataSection,
    EvaluateSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    PrivacySection,
    RunSection,
    Section,
    StrategySection,
    TrainSection,
)
from fedlab.config.tasks import Gram, StageSection, StreamSection, TaskSection


class RunConfig(Section):
    """A whole run. ``RunConfig.load(path, overrides)`` reads it; ``to_toml`` writes the resolved form."""

    run: RunSection
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    lora: LoraSection
    data: DataSection = DataSection()
    clients: ClientsSection = ClientsSection()
    strategy: StrategySection = StrategySection()
    train: TrainSection
    privacy: PrivacySection = PrivacySection()
    evaluate: EvaluateSection = EvaluateSection()
    tasks: tuple[TaskSection, ...] = ()
    stream: StreamSection = StreamSection()
    stage: StageSection | None = None

    @model_validator(mode="after")
    def _a_stream(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(
                f"tasks: two are called {next(n for n in names if names.count(n) > 1)!r}; give each a name of its own"
            )
        if not names and (self.stream != StreamSection() or self.stage is not None):
            raise ValueError("[stream] and [stage] belong to a configuration with [[tasks]]; add tasks or remove them")
        if self.stage is not None and self.stage.task >= len(names):
            raise ValueError(f"stage.task = {self.stage.task}, but there are {len(names)} tasks, counted from 0")
        for task in self.tasks:
            DataSection.model_validate({**self.data.model_dump(), **task.data})
            if odd := sorted(task.data.keys() & {"clients", "max_length"}):
                raise ValueError(f"tasks: {task.name} sets data.{odd[0]}, which all tasks share")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.run.min_clients > self.clients_per_round:
            raise ValueError(
                f"run.min_clients = {self.run.min_clients} can never be reached: {self.clients_per_round} of "
                f"{self.data.clients} clients are drawn per round"
            )
        if self.run.sampling == "poisson" and self.privacy.unit != "client":
            raise ValueError(
                'run.sampling = "poisson" amplifies client-level DP only: participation is visible to the server; use'
                " balanced or uniform"
            )
        if self.run.checkpointing and self.train.gradients != "fused":
            raise ValueError(f'run.checkpointing = true needs train.gradients = "fused", got "{self.train.gradients}"')
        for key, rank in self.clients.rank.items():
            if rank > self.lora.rank:
                raise ValueError(
                    f"clients.rank: {key} = {rank} exceeds lora.rank = {self.lora.rank}, the largest that the server"
                    " keeps"
                )
        count = self.data.clients
        for name, key in [("rank", key) for key in self.clients.rank] + [("lr", key) for key in self.clients.lr]:
            if not key.endswith("%") and int(key[7:]) >= count:
                raise ValueError(
                    f"clients.{name}: {key} is none of the {count} clients; they are client-0 to client-{count - 1}"
                )
        cap = self.privacy.participations
        if cap is not None and cap * self.data.clients < self.run.min_clients:
            raise ValueError(f"privacy.participations = {cap} cannot cover one round of {self.run.min_clients} clients")
        return self

    @property
    def clients_per_round(self) -> int:
        """Clients drawn per round: ``run.fraction`` of ``data.clients``, at least one."""
        return max(1, round(self.run.fraction * self.data.clients))

    @property
    def cohort_size(self) -> int:
        """Clients that share a pass at most. Nothing about nodes goes into it: they must not change a bit.

        As many as make 128 rows in a step, and up to 512 (texts of like length meet, so less is padding) while 8 groups
        are left to share among nodes.
        """
        if self.train.gradients != "fused":
            return 1
        enough, most = (-(-rows // self.train.batch_size) for rows in (128, 512))
        return self.run.cohort or min(64, max(4, enough, min(most, -(-self.clients_per_round // 8))))

    @property
    def participations(self) -> int:
        """Rounds that one client may take part in at most. Balanced sampling never needs more than this default."""
        if self.privacy.unit == "client":
            return self.run.rounds
        if self.privacy.participations is not None:
            return min(self.privacy.participations, self.run.rounds)
        return -(-self.clients_per_round * self.run.rounds // self.data.clients)

    @property
    def is_stream(self) -> bool:
        """Whether this is a chain of runs, not one of its links."""
        return bool(self.tasks) and self.stage is None

    @property
    def sampling_seed(self) -> int:
        """Seed of what is drawn from round to round (batches, noise, masks, who takes part): in a stream each task has
        its own.
        """
        from fedlab.seeds import stream_seed  # numpy with it

        return self.run.seed if self.stage is None else stream_seed(self.run.seed, "task", self.stage.task)

    @property
    def task_rounds(self) -> list[int]:
        """Rounds of each task of a stream."""
        return [task.rounds or self.run.rounds for task in self.tasks]

    @property
    def gram(self) -> Gram | None:
        """The release at the end of each task but the last; None if the strategy asks for none.

        A strategy that asks for it says so by its key ``gram``, which is there in every configuration that a launcher
        has resolved (``Strategy.resolved``).
        """
        asked = self.tasks and not self.stream.joint and "gram" in self.strategy.options
        return Gram.model_validate(self.strategy.options["gram"]) if asked else None

    def at_stage(self, task: int, previous: str | None) -> RunConfig:
        """The configuration of one link of a stream. Under ``stream.joint`` there is one, with all rounds."""
        rounds = self.task_rounds
        tree = self.model_dump(mode="json", exclude_none=True)
        for entry, count in zip(tree["tasks"], rounds, strict=True):
            entry["rounds"] = count
        tree["run"]["rounds"] = sum(rounds) if self.stream.joint else rounds[task]
        tree["stage"] = {"task": task, **({"previous": previous} if previous else {})}
        return RunConfig.model_validate(tree)

    @property
    def private(self) -> bool:
        """Whether noise is added at all."""
        return self.privacy.unit != "none"

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
        """Read a TOML file and apply ``section.key=value`` overrides. Raises ConfigError."""
        return cls.parse(read_text(path), overrides, origin=str(path))

    @classmethod
    def parse(cls, text: str, overrides: list[str] | tuple[str, ...] = (), origin: str = "configuration") -> RunConfig:
        """Read TOML text. Raises ConfigError that names the key, its value and, for unknown keys, the nearest one."""
        return parse_model(cls, text, overrides, origin)

    def to_toml(self) -> str:
        """The resolved configuration, defaults included; ``parse(to_toml())`` gives the same object."""
        outside = set() if self.tasks else {"tasks", "stream"}
        return tomli_w.dumps(without_none(self.model_dump(mode="json", exclude=outside)))
