"""A client's own file (``client.toml``): who it is, where its data and its copies of models lie, and under what policy
they may be used.

It lies on the client's machine and nothing in it comes from a server. A deployed client reads its own data, by its own
column map, and loads its own copies of models; of a run's ``[data]`` it takes ``max_length`` alone. What the policy
says is held against every request before data are opened (``clients.policy``).
"""

from __future__ import annotations

import pwd
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fedlab.config.base import Section
from fedlab.config.data import DataSection
from fedlab.config.load import parse_model, read_text
from fedlab.config.monitor import LogSection, MetricsSection
from fedlab.config.sections import Budget
from fedlab.config.server import split_address
from fedlab.errors import ConfigError
from fedlab.identifiers import checked_identifier

PartName = Literal["lora_A", "lora_B", "head"]
ReleaseName = Literal["size", "timing", "failure", "update", "training-metrics", "scores", "gram"]
ALWAYS: tuple[ReleaseName, ...] = ("size", "timing", "failure")  # no run works without them
OWN = (  # of [data] of a run: what a client's own file says instead, under the same name
    "source",
    "path",
    "subset",
    "split",
    "revision",
    "text",
    "label",
    "context",
    "messages",
    "on_bad_row",
    "duplicates",
    "limit",
)


class ClientSection(Section):
    """[client]: who this is, and which server it works with."""

    id: str = Field(description="the client's name: its owner's, a site's; the same in every run")
    server: str | None = Field(default=None, description="host:port of the server; not needed by the trainer alone")
    ca: str | None = Field(default=None, description="certificate of the authority that signed the server's (PEM)")
    key: str | None = Field(default=None, description="this node's private key (fedlab keys node)")
    home: str | None = Field(
        default=None, description="directory of its ledger, its key and what it keeps; default: the id, beside the file"
    )
    socket: str | None = Field(
        default=None, description="Unix socket of the resident trainer; default: trainer.sock in home"
    )
    transport_user: str | None = Field(
        default=None, description="user that Flower's processes run as (name or uid); default: the one who starts them"
    )
    insecure: bool = Field(default=False, description="speak to the server without TLS: only on networks of your own")

    @field_validator("server")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value


class OwnData(Section):
    """[data]: the records of this client, and their columns by what they mean."""

    source: Literal["docstrings", "wordnet", "code", "definitions", "files", "hub"] = Field(
        default="files", description="kind of the source (as data.source of a run)"
    )
    path: str | None = Field(default=None, description="file or directory; hub: id of the data set")
    subset: str | None = Field(default=None, description="hub: configuration; wordnet: part of speech")
    split: str = Field(default="train", description="hub: the split that is trained on")
    revision: str | None = Field(default=None, description="hub: commit, tag or branch")
    text: str | tuple[str, ...] | None = Field(default=None, description="text column, or two")
    label: str | None = Field(default=None, description="label column, or that of the answer")
    context: str | None = Field(default=None, description="column that follows the prompt")
    messages: str | None = Field(default=None, description="column of whole conversations")
    on_bad_row: Literal["refuse", "drop"] = Field(
        default="refuse", description="rows that lack something: the run is refused, or they are left out"
    )
    duplicates: Literal["keep", "purge"] = Field(default="keep", description="held-out texts that are trained on")
    limit: int | None = Field(default=None, gt=0, description="train on at most this many records; default: all")
    held_out: float = Field(
        default=0.1, gt=0, lt=1, description="share of the records that is held out, never trained on"
    )
    seed: int = Field(default=0, ge=0, description="of which records are held out")

    @model_validator(mode="after")
    def _readable(self) -> OwnData:
        self.section(64)
        return self

    def section(self, max_length: int) -> DataSection:
        """The ``[data]`` that reads these records, with texts of at most so many tokens."""
        own = self.model_dump(include=set(OWN))
        return DataSection.model_validate(
            {
                **own,
                "clients": 1,
                "min_client_size": 2,
                "max_length": max_length,
                "test_fraction": self.held_out,
                "seed": self.seed,
            }
        )


class ModelCopy(Section):
    """[models."NAME"]: a base model that may be run on the data. NAME is what runs call it (model.name)."""

    path: str | None = Field(
        default=None, description="where this machine's copy lies; default: NAME is a package, or a hub id in its cache"
    )
    revision: str | None = Field(
        default=None, description="hub: commit, tag or branch of the copy; what a run says of it is not used"
    )
    sha256: tuple[str, ...] = Field(
        default=(), description="what its files may hash to (fedlab client --check prints it); default: any"
    )


class ClientPolicy(Section):
    """[policy]: what a client takes part in. Everything else it refuses."""

    unit: Literal["example", "client", "none"] = Field(
        default="example", description="what a run must protect (privacy.unit), exactly"
    )
    shared_noise: bool = Field(
        default=False,
        description=(
            "take part under shared noise (privacy.survivors), where one's own noise protects only in a sum; needs"
            " [roster]"
        ),
    )
    min_honest: int = Field(
        default=2,
        gt=0,
        description="shared noise: fewest honest clients whose noise a sum has (privacy.survivors − colluding)",
    )
    noise: Literal["secure", "seeded"] = Field(
        default="secure",
        description="where noise must come from: seeded noise can be subtracted by who knows the seed (tests only)",
    )
    min_sigma: float | None = Field(default=None, gt=0, description="least noise multiplier of a run")
    max_epsilon: float | None = Field(default=None, gt=0, description="most ε that one run may spend")
    max_delta: float = Field(default=1e-5, gt=0, lt=1, description="greatest δ of a run's ε, and of the budget's")
    max_clip: float | None = Field(default=None, gt=0, description="greatest clipping norm; default: any")
    min_batch: int = Field(
        default=8, gt=0, description="fewest expected examples per step; of a batch of one, a gradient shows the label"
    )
    trained: tuple[PartName, ...] = Field(
        default=("lora_A", "lora_B", "head"), description="parts of a model that may be trained on the data"
    )
    releases: tuple[ReleaseName, ...] = Field(
        default=ALWAYS, description="what may leave without noise; training-metrics, scores and update only if named"
    )

    @model_validator(mode="after")
    def _says_enough(self) -> ClientPolicy:
        if self.unit == "example" and self.min_sigma is None and self.max_epsilon is None:
            raise ValueError('unit = "example" needs a limit: give max_epsilon, min_sigma, or both')
        if self.unit != "example" and "update" not in self.releases:
            raise ValueError(
                f'unit = "{self.unit}" sends updates to the server as they are; if that is meant, name "update" in'
                " releases"
            )
        if missing := [name for name in ALWAYS if name not in self.releases]:
            raise ValueError(f"releases: {', '.join(missing)} is missing, and no run works without")
        return self


class Machine(Section):
    """[machine]: what the trainer may use."""

    threads: int | None = Field(default=None, gt=0, description="torch threads; default: the run's (run.threads)")
    device: str | None = Field(default=None, description='"cpu", "cuda", "cuda:1", "mps"; default: that of the run')
    deadline: float | None = Field(
        default=None,
        gt=0,
        description="seconds for one answer; a trainer that takes longer is ended and started again, and what it was"
        " charged for stays charged; default: none",
    )


class ClientFile(Section):
    """``client.toml``. ``ClientFile.load(path)`` reads it; its paths are relative to the file."""

    client: ClientSection = Field(description="who this is, and which server it works with")
    data: OwnData = Field(description="the records of this client")
    models: dict[str, ModelCopy] = Field(min_length=1, description="base models that may be run on the data")
    policy: ClientPolicy = Field(description="what it takes part in")
    roster: dict[str, str] = Field(
        default={},
        description=(
            "client id = its ledger's public key (64 hex digits; fedlab client --check prints one's own): the peers of"
            " a sum under shared noise; whoever is not in it, or has another key, is refused"
        ),
    )
    budget: Budget | None = Field(default=None, description="what may be spent of the data over all runs")
    machine: Machine = Field(default=Machine(), description="what the trainer may use")
    metrics: MetricsSection = Field(default=MetricsSection(), description="a Prometheus endpoint, for this machine")
    log: LogSection = Field(default=LogSection(), description="how its log is written")

    @model_validator(mode="after")
    def _named(self) -> ClientFile:
        checked_identifier(self.client.id, "client.id")
        for name, key in self.roster.items():
            checked_identifier(name, "roster")
            if not re.fullmatch("[0-9a-f]{64}", key):
                raise ValueError(f"roster: {name} = {key[:70]!r} is no public key; it has 64 lower-case hex digits")
        if len(set(self.roster.values())) < len(self.roster):
            raise ValueError("roster: two clients have one key; each has a key of its own")
        if self.policy.unit == "example" and self.budget is None:
            raise ValueError(
                "[budget] is missing: without one, runs could follow runs for ever; say how much may be spent in all,"
                " for example epsilon = 8.0"
            )
        return self

    @property
    def home(self) -> Path:
        """Where it keeps what is its own."""
        assert self.client.home is not None
        return Path(self.client.home)

    @property
    def counted_budget(self) -> Budget | None:
        """The budget with its δ: the policy's where it names none, so that no server's δ makes the budget cheap."""
        if self.budget is None or self.budget.delta is not None:
            return self.budget
        return Budget(epsilon=self.budget.epsilon, delta=self.policy.max_delta)

    @property
    def transport_user(self) -> int | None:
        """Number of the user that what carries messages runs as; None: of whoever starts it.

        Raises ConfigError if this machine has none of that name.
        """
        name = self.client.transport_user
        if name is None:
            return None
        try:
            return int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid
        except KeyError:
            raise ConfigError(f"client.transport_user = {name!r}: this machine has no such user") from None

    @property
    def socket(self) -> Path:
        """Where its resident trainer listens."""
        return Path(self.client.socket) if self.client.socket is not None else self.home / "trainer.sock"

    @classmethod
    def load(cls, path: str | Path) -> ClientFile:
        """Read a client's file. Raises ConfigError."""
        return cls.parse(read_text(path), Path(path).absolute().parent, str(path))

    @classmethod
    def parse(cls, text: str, directory: Path, origin: str = "client.toml") -> ClientFile:
        """Read a client's file from its text; ``directory``: what its paths are relative to. Raises ConfigError."""
        found = parse_model(cls, text, (), origin)
        tree = found.model_dump()
        for key in ("ca", "key", "home", "socket"):
            tree["client"][key] = _below(directory, tree["client"][key])
        tree["client"]["home"] = tree["client"]["home"] or str(directory / found.client.id)
        if found.data.source != "hub":
            tree["data"]["path"] = _below(directory, found.data.path)
        for copy in tree["models"].values():
            if copy["path"] is not None and (directory / Path(copy["path"]).expanduser()).exists():
                copy["path"] = _below(directory, copy["path"])
        return cls.model_validate(tree)


def _below(directory: Path, value: Any) -> str | None:
    """A path of the file as an absolute one."""
    return None if value is None else str(directory / Path(value).expanduser())
