"""A coordinator's own file (``server.toml``): where the server listens, its keys, and how patient a run is.

It lies on the coordinator's machine; clients never see it. What all parties agree on is the run's TOML
(``fedlab.config.run``). Paths are relative to the file that names them.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fedlab.config.base import Section
from fedlab.config.data import DataSection
from fedlab.config.load import parse_model, read_text
from fedlab.config.monitor import LogSection, MetricsSection

PORT = 8443
INNER_PORT = 8444


def split_address(address: str) -> tuple[str, int]:
    """``"host:port"`` (``"[::1]:8443"`` for IPv6) → host, port. Raises ValueError with a sentence."""
    host, colon, number = address.rpartition(":")
    if "/" in address:
        raise ValueError(f"{address!r} is no host:port; leave out https:// and what follows the port")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or not (number.isascii() and number.isdigit()) or not 0 < int(number) < 65536:
        raise ValueError(f"{address!r} is no host:port; write for example fed.example.org:{PORT}")
    if ":" in bare and not host.startswith("["):
        raise ValueError(f"{address!r} is no host:port; write an IPv6 address in brackets, for example [::1]:{PORT}")
    return bare, int(number)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ServerSection(Section):
    """[server]: where clients reach it, and what it needs for that."""

    address: str = Field(
        default=f"0.0.0.0:{PORT}", description="host:port that clients reach; the only port to open in a firewall"
    )
    inner_port: int = Field(
        default=INNER_PORT, gt=0, lt=65536, description="port of Flower's SuperLink, on 127.0.0.1 only"
    )
    keys: str = Field(default="keys", description="directory of keys (fedlab keys init)")
    state: str = Field(default="state", description="directory of what the server remembers, and of its logs")
    runs: str = Field(default="runs", description="directory where fedlab run --server SERVER.toml puts runs")
    insecure: bool = Field(
        default=False,
        description="without TLS and without node keys: only on networks of your own, never with real data",
    )
    max_body: int = Field(
        default=512, gt=0, description="largest body of one request, in MiB; an adapter travels in one"
    )

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        split_address(value)
        return value

    @model_validator(mode="after")
    def _two_ports(self) -> ServerSection:
        if self.port == self.inner_port:
            raise ValueError(f"address and inner_port name the same port {self.port}; choose two")
        return self

    @property
    def host(self) -> str:
        return split_address(self.address)[0]

    @property
    def port(self) -> int:
        return split_address(self.address)[1]


class RoundsSection(Section):
    """[rounds]: how patient a run is with its clients."""

    wait: float = Field(
        default=600, ge=0, description="seconds that a run waits for as many clients as it needs, then it ends"
    )
    retries: int = Field(default=1, ge=0, description="how often a round that fell short is tried again")


class PublicTest(Section):
    """[test]: a public file of the coordinator's, to score the model on; else clients' held-out shares are used."""

    source: Literal["files", "hub", "docstrings", "wordnet", "code", "definitions"] = Field(
        default="files", description="kind of the source (as data.source of a run)"
    )
    path: str | None = Field(default=None, description="file or directory; hub: id of the data set")
    subset: str | None = Field(default=None, description="hub: configuration; wordnet: part of speech")
    split: str = Field(default="test", description="hub: the split that is scored on")
    revision: str | None = Field(default=None, description="hub: commit, tag or branch")
    text: str | tuple[str, ...] | None = Field(default=None, description="text column, or two")
    label: str | None = Field(default=None, description="label column, or that of the answer")
    context: str | None = Field(default=None, description="column that follows the prompt")
    messages: str | None = Field(default=None, description="column of whole conversations")
    limit: int | None = Field(default=None, gt=0, description="score on at most this many records; default: all")

    def section(self, max_length: int) -> DataSection:
        """The ``[data]`` that reads these records, with texts of at most so many tokens."""
        return DataSection.model_validate({**self.model_dump(), "max_length": max_length})


class ServerFile(Section):
    """The whole file. Every section has a default: an empty file is a server with TLS on port 8443.

    ``folder`` is that of the file, which its paths are relative to.
    """

    server: ServerSection = ServerSection()
    rounds: RoundsSection = RoundsSection()
    test: PublicTest | None = Field(
        default=None, description="public records of the coordinator's, to score the model on; else clients' shares are"
    )
    metrics: MetricsSection = MetricsSection()
    log: LogSection = LogSection()

    @classmethod
    def load(cls, path: str | Path) -> ServerFile:
        """Read it; its paths become absolute. Raises ConfigError."""
        return cls.parse(read_text(path), Path(path).resolve().parent, str(path))

    @classmethod
    def parse(cls, text: str, folder: Path, origin: str = "server.toml") -> ServerFile:
        """From TOML, with paths relative to ``folder``. Raises ConfigError."""
        found = parse_model(cls, text, (), origin)
        places = {name: str(folder / Path(getattr(found.server, name)).expanduser()) for name in PLACES}
        update: dict[str, object] = {"server": found.server.model_copy(update=places)}
        if found.test is not None and found.test.source == "files" and found.test.path is not None:
            test = str(folder / Path(found.test.path).expanduser())
            update["test"] = found.test.model_copy(update={"path": test})
        return found.model_copy(update=update)

    @property
    def keys(self) -> Path:
        return Path(self.server.keys)

    @property
    def state(self) -> Path:
        return Path(self.server.state)

    @property
    def runs(self) -> Path:
        return Path(self.server.runs)

    @property
    def inner_address(self) -> str:
        """Where the SuperLink listens: control and runtime are there, and nowhere else."""
        return f"127.0.0.1:{self.server.inner_port}"


PLACES = ("keys", "state", "runs")
