"""What a run is: frozen pydantic models read from TOML, saved with the run, unknown keys rejected.

Light on purpose: importing this module imports neither torch nor flwr, so that a misspelt key is reported at once.
The sections and their keys are in ``fedlab.config.sections``, what must hold between them in
``fedlab.config.consistency``.
"""

from __future__ import annotations

from pathlib import Path

import tomli_w
from pydantic import Field, model_validator

from fedlab.config import consistency
from fedlab.config.data import DEFAULT_CLIENTS
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
from fedlab.errors import ConfigError


class RunConfig(Section):
    """A whole run. ``RunConfig.load(path, overrides)`` reads it; ``to_toml`` writes the resolved form."""

    run: RunSection = Field(description="how long, where, and from which seed")
    model: ModelSection = Field(default=ModelSection(), description="the base model, frozen")
    objective: ObjectiveSection = Field(default=ObjectiveSection(), description="what is learnt")
    lora: LoraSection = Field(description="where adapters go and how large they are")
    data: DataSection = Field(default=DataSection(), description="the text, its labels, and who holds what")
    clients: ClientsSection = Field(default=ClientsSection(), description="what differs between clients")
    strategy: StrategySection = Field(default=StrategySection(), description="how updates become the next state")
    train: TrainSection = Field(description="one client's local steps in one round")
    privacy: PrivacySection = Field(default=PrivacySection(), description="what one unit is protected to")
    evaluate: EvaluateSection = Field(default=EvaluateSection(), description="what is measured, and how often")
    tasks: tuple[TaskSection, ...] = Field(default=(), description="the tasks of a stream, one after another")
    stream: StreamSection = Field(default=StreamSection(), description="what the tasks have to do with each other")
    stage: StageSection | None = Field(default=None, description="which run of a stream this is; written by fedlab")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        known = self.population_known
        problems = [
            *consistency.streams(self.tasks, self.stream, self.stage, self.data),
            *consistency.participation(
                self.run,
                self.privacy,
                self.population if known else None,
                self.clients_per_round if known else 0,
            ),
            *consistency.memorisation(self.tasks, self.data, self.evaluate),
            *consistency.noised_scores(self.tasks, self.privacy, self.evaluate),
            *consistency.training(self.run, self.train, self.privacy),
            *consistency.shared_noise(
                self.privacy,
                self.train,
                self.clients,
                self.strategy,
                self.clients_per_round if known else None,
            ),
            *consistency.adapters(self.lora, self.clients),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def population_known(self) -> bool:
        """Whether the number of clients follows from the configuration; else a column of the data says it."""
        return self.data.clients is not None or self.data.partition.kind != "natural"

    @property
    def population(self) -> int:
        """Number of clients of the run. Raises ConfigError where only the data know it (``launch.prepared`` asks)."""
        if not self.population_known:
            raise ConfigError(
                f"data.clients is not given, and column {self.data.partition.column!r} was not read yet; give it"
            )
        return self.data.clients or DEFAULT_CLIENTS

    @property
    def clients_per_round(self) -> int:
        """Clients drawn per round: ``run.fraction`` of all, at least one."""
        return max(1, round(self.run.fraction * self.population))

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
        return -(-self.clients_per_round * self.run.rounds // self.population)

    @property
    def private(self) -> bool:
        """Whether noise is added at all."""
        return self.privacy.unit != "none"

    @property
    def shared_noise(self) -> bool:
        """Whether the clients' noise shares add up in a sum, which is all that the server sees of their updates."""
        return self.privacy.survivors is not None

    @property
    def is_stream(self) -> bool:
        """Whether this is a sequence of runs, one per task, and not one of them."""
        return bool(self.tasks) and self.stage is None

    @property
    def task_rounds(self) -> list[int]:
        """Rounds of each task of a stream."""
        return [task.rounds or self.run.rounds for task in self.tasks]

    @property
    def sampling_seed(self) -> int:
        """Seed of what is drawn from round to round (batches, noise, masks, who takes part): in a stream each task has
        its own.
        """
        from fedlab.seeds import stream_seed  # numpy with it

        return self.run.seed if self.stage is None else stream_seed(self.run.seed, "task", self.stage.task)

    @property
    def data_seed(self) -> int:
        """Seed of who holds what."""
        return self.run.seed if self.data.seed is None else self.data.seed

    @property
    def gram(self) -> Gram | None:
        """The release at the end of each task but the last; None if the strategy asks for none.

        A strategy that asks for it says so by its key ``gram``, which is there in every configuration that a launcher
        has resolved (``Strategy.resolved``).
        """
        asked = self.tasks and not self.stream.joint and "gram" in self.strategy.options
        return Gram.model_validate(self.strategy.options["gram"]) if asked else None

    def at_stage(self, task: int, previous: str | None) -> RunConfig:
        """The configuration of one task's run in a stream. Under ``stream.joint`` there is one, with all rounds."""
        rounds = self.task_rounds
        tree = self.model_dump(mode="json", exclude_none=True)
        for entry, count in zip(tree["tasks"], rounds, strict=True):
            entry["rounds"] = count
        tree["run"]["rounds"] = sum(rounds) if self.stream.joint else rounds[task]
        tree["stage"] = {"task": task, **({"previous": previous} if previous else {})}
        return RunConfig.model_validate(tree)

    def with_population(self, clients: int) -> RunConfig:
        """The same run with its number of clients written down. Raises ConfigError where that makes no sense."""
        tree = self.model_dump(mode="json", exclude_none=True)
        tree["data"]["clients"] = clients
        return RunConfig.parse(tomli_w.dumps(tree))

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
