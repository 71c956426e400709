"""What a run is: frozen pydantic models read from TOML, saved with the run, unknown keys rejected.

Light on purpose: importing this module imports neither torch nor flwr, so that a misspelt key is reported at once.
The sections and their keys are in ``fedlab.sections``.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pydantic
import tomli_w
from pydantic import model_validator

from fedlab.errors import ConfigError
from fedlab.sections import (
    ClientsSection,
    DataSection,
    EvaluateSection,
    LoraSection,
    ModelSection,
    PrivacySection,
    RunSection,
    Section,
    StrategySection,
    TrainSection,
)
from fedlab.stream import READS_INPUTS, Gram, StageSection, StreamSection, TaskSection


class RunConfig(Section):
    """A whole run. ``RunConfig.load(path, overrides)`` reads it; ``to_toml`` writes the resolved form."""

    run: RunSection
    model: ModelSection = ModelSection()
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
            raise ValueError(f"tasks: two are called {next(n for n in names if names.count(n) > 1)!r}; give each a name of its own")
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
        if self.lora.public is not None and self.lora.init_a != "eva" and not self.strategy.options.get("importance"):
            raise ValueError(
                f'lora.public is read for init_a = "eva" (it is "{self.lora.init_a}") and for strategy.importance = true only; '
                'remove it, or set init_a = "eva"'
            )
        if self.run.min_clients > self.clients_per_round:
            raise ValueError(
                f"run.min_clients = {self.run.min_clients} can never be reached: {self.clients_per_round} of "
                f"{self.data.clients} clients are drawn per round"
            )
        if self.run.sampling == "poisson" and self.privacy.unit != "client":
            raise ValueError(
                'run.sampling = "poisson" amplifies client-level DP only: participation is visible to the server; use balanced or uniform'
            )
        if self.run.checkpointing and self.train.gradients != "fused":
            raise ValueError(f'run.checkpointing = true needs train.gradients = "fused", got "{self.train.gradients}"')
        for key, rank in self.clients.rank.items():
            if rank > self.lora.rank:
                raise ValueError(f"clients.rank: {key} = {rank} exceeds lora.rank = {self.lora.rank}, the largest that the server keeps")
        count = self.data.clients
        for name, key in [("rank", key) for key in self.clients.rank] + [("lr", key) for key in self.clients.lr]:
            if not key.endswith("%") and int(key[7:]) >= count:
                raise ValueError(f"clients.{name}: {key} is none of the {count} clients; they are client-0 to client-{count - 1}")
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

        As many as make 128 rows in a step, and up to 512 (texts of like length meet, so less is padding) while 8 groups are left to share
        among nodes.
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
    def draws(self) -> int:
        """Seed of what is drawn from round to round (batches, noise, masks, who takes part): in a stream each task has its own."""
        from fedlab.seeds import stream_seed  # numpy with it

        return self.run.seed if self.stage is None else stream_seed(self.run.seed, "task", self.stage.task)

    @property
    def task_rounds(self) -> list[int]:
        """Rounds of each task of a stream."""
        return [task.rounds or self.run.rounds for task in self.tasks]

    @property
    def gram(self) -> Gram | None:
        """The release at the end of each task but the last; None if the strategy asks for none."""
        asked = self.tasks and not self.stream.joint and self.strategy.name in READS_INPUTS
        return Gram.model_validate(self.strategy.options.get("gram", {})) if asked else None

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
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read configuration {str(path)!r}: {error.strerror}") from None
        return cls.parse(text, overrides, origin=str(path))

    @classmethod
    def parse(cls, text: str, overrides: list[str] | tuple[str, ...] = (), origin: str = "configuration") -> RunConfig:
        """Read TOML text. Raises ConfigError that names the key, its value and, for unknown keys, the nearest one."""
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{origin} is not valid TOML: {error}") from None
        for override in overrides:
            _set(tree, override)
        try:
            return cls.model_validate(tree)
        except pydantic.ValidationError as error:
            lines = [_explain(detail) for detail in error.errors()]
            more = f"\n(and {len(lines) - 2} more)" if len(lines) > 2 else ""
            raise ConfigError("\n".join(lines[:2]) + more) from None

    def to_toml(self) -> str:
        """The resolved configuration, defaults included; ``parse(to_toml())`` gives the same object."""
        outside = set() if self.tasks else {"tasks", "stream"}
        return tomli_w.dumps(_without_none(self.model_dump(mode="json", exclude=outside)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value``; the value is read as TOML; a bare word, path or address as a string."""
    key, equals, raw = override.partition("=")
    path = key.strip().split(".")
    section = len(path) == 1 and raw.strip().startswith("{")  # privacy={unit="none"} replaces the whole section
    if not equals or not all(path) or not (section or len(path) > 1):
        raise ConfigError(f"--set {override!r}: write section.key=value, for example --set train.lr=0.5")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        if not re.fullmatch(r"[\w./:~@+-]*\w[\w./:~@+-]*", raw.strip()):
            raise ConfigError(f"--set {override!r}: {raw.strip()!r} is not a TOML value") from None
        value = raw.strip()
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is not a section")
    tree[path[-1]] = value


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _explain(detail: Any) -> str:
    location, key = tuple(detail["loc"]), ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return unknown_key(key, str(location[-1]), _fields_at(location[:-1]))
    if detail["type"] == "missing":
        return f"{key} is missing: {detail['msg'].lower()}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    shown = "" if isinstance(detail["input"], dict | pydantic.BaseModel) else f", got {detail['input']!r}"
    return f"{key + ': ' if key else ''}{message}{shown}"


def unknown_key(key: str, name: str, known: list[str]) -> str:
    """Sentence for a key that does not exist, naming the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {key[: len(key) - len(name)]}{near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key {key}; {hint}"
