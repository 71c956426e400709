"""Clients with files of their own in this process, and everything that can happen to them and to what they send."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

import strategies.server.discovery
import strategies.server.exchange
from clients.answer import answer
from clients.serve import OwnDesk
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.privacy.accounting import epsilon
from fedlab.privacy.audit.run import audit_run
from fedlab.privacy.ledger.ledger import Entry, events, parse_lines
from fedlab.protocol import Frame, decode
from fedlab.protocol.messages import REQUESTS
from fedlab.run.deployment import Deployment
from fedlab.run.directory import RunDirectory
from fedlab.run.launch import Run, deploy_run, resume
from fedlab.run.launch.local import LocalGrid
from fedlab.run.regenerate import regenerate

LABELS = ["fruit", "metal", "ocean"]
FIRST_NODE = 10
CLIENT_FILE = """
[client]
id = "{name}"
home = "{home}"
[data]
path = "{data}"
text = "text"
label = "topic"
[models."{model}"]
path = "{model}"
[policy]
min_sigma = 0.5
max_epsilon = 90.0
[budget]
epsilon = 190.0
"""


class Lost(BaseException):
    """What was sent never comes to an answer."""


class Killed(Exception):
    """The trainer is gone; whoever carried its bytes answers with a bare code."""


NO_ANSWER = Frame("failure", b'{"code":"failed"}', b"[]", b"")


@dataclass
class Site:
    """One client's machine: its file, and the trainer's process."""

    file: ClientFile
    desk: OwnDesk

    @property
    def name(self) -> str:
        return self.file.client.id

    @property
    def ledger(self) -> Path:
        return self.file.home / "ledger" / f"{self.name}.jsonl"

    @property
    def entries(self) -> list[Entry]:
        return parse_lines(self.ledger.read_text()) if self.ledger.is_file() else []

    def kinds(self) -> list[str]:
        return [entry["type"] for entry in self.entries]

    @property
    def log(self) -> str:
        return (self.file.home / "ledger" / "log.txt").read_text()

    def start_again(self) -> None:
        """Another process: what it remembers is on the disk."""
        self.desk = OwnDesk(self.file)

    def change(self, old: str, new: str) -> None:
        """Another line in its file, and the trainer started again."""
        tree = self.file.model_dump_json()
        assert json.dumps(old)[1:-1] in tree
        self.file = ClientFile.model_validate_json(tree.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1]))
        self.start_again()


@dataclass
class Asked:
    """A message at a client."""

    site: Site
    frame: Frame
    times: int  # so many messages of this kind and round came to it, this one counted

    @property
    def kind(self) -> str:
        return self.frame.kind

    @property
    def round(self) -> int:
        return getattr(decode(self.frame, REQUESTS), "round", 0)

    def answer(self) -> Frame:
        return answer(self.frame, self.site.desk)


Fault = Callable[[Asked], Frame]


class Clock:
    """A clock that moves while somebody waits, and does what is to happen meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.plans: list[tuple[float, Callable[[], object]]] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 20.0)
        for plan in [plan for plan in self.plans if plan[0] <= self.now]:
            self.plans.remove(plan)
            plan[1]()

    def at(self, moment: float, what: Callable[[], object]) -> None:
        self.plans.append((moment, what))


class Grid(LocalGrid):
    """A grid whose nodes come, go, are started again and shut out, and whose server is away for a while."""

    def __init__(self, app: Any, world: Sites) -> None:
        super().__init__(app, len(world.sites))
        self._world = world

    @property
    def outages(self) -> int:
        return self._world.outages

    def get_node_ids(self) -> Iterable[int]:
        return [FIRST_NODE + i for i, site in enumerate(self._world.sites) if site.name in self._world.there]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        names = [self._world.sites[message.metadata.dst_node_id - FIRST_NODE].name for message in sent]
        ids = super().push_messages(sent)
        return [one if name not in self._world.shut_out else "" for one, name in zip(ids, names, strict=True)]

    def get_nodes(self) -> Iterable[NodeInfo]:
        names = {node: self._world.sites[node - FIRST_NODE].name for node in self.get_node_ids()}
        started = self._world.started
        return [NodeInfo(node_id=node, last_activated_at=str(started.get(name, 0))) for node, name in names.items()]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        try:
            return super().pull_messages(message_ids)
        except Lost:
            return []


@dataclass
class Sites:
    """All clients of a server, the faults that befall them, and the runs with them."""

    sites: list[Site]
    clock: Clock
    path: Path
    toml: str
    there: set[str] = field(default_factory=set)
    started: dict[str, int] = field(default_factory=dict)
    shut_out: set[str] = field(default_factory=set)
    outages: int = 0
    fault: Fault = Asked.answer
    wait: float = 100.0
    retries: int = 1
    asked: list[tuple[str, str, int]] = field(default_factory=list)  # client, kind, round

    def __getitem__(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def _app(self, message: Message, context: Context) -> Message:
        fields: dict[str, Any] = dict(message.content.config_records["fedlab"])
        asked = Asked(self.sites[int(context.node_config["partition-id"])], Frame(**fields), 0)
        line = (asked.site.name, asked.kind, asked.round)
        self.asked.append(line)
        asked.times = self.asked.count(line)
        try:
            reply = self.fault(asked)
        except Killed:
            asked.site.start_again()
            reply = NO_ANSWER
        return Message(RecordDict({"fedlab": ConfigRecord(vars(reply))}), reply_to=message)

    def _carry(self, server_app: Any, client_app: Any, config: RunConfig, run_config: dict[str, Any]) -> None:
        server_app(Grid(self._app, self), Context(1, 1, {}, RecordDict(), run_config))

    def config(self, *overrides: str) -> RunConfig:
        given = ["privacy.noise=secure", f"objective.labels={json.dumps(LABELS)}", "evaluate.clients=never"]
        given += ["run.rounds=2", f"data.clients={len(self.sites)}"]
        return RunConfig.parse(self.toml, [*given, *overrides])

    def run(self, *overrides: str) -> Run:
        """A run with whoever is there; as it ends, whatever happens."""
        deployment = Deployment(server="here", wait=self.wait, retries=self.retries)
        return deploy_run(self.config(*overrides), deployment, self.path, True, self._carry)

    def resume(self) -> Run:
        return resume(self.path, True, self._carry)

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.path / "result.json").read_text())

    @property
    def server_log(self) -> str:
        return (self.path / "log.txt").read_text()

    def excluded(self) -> list[dict[str, str]]:
        """Client → reason, for each round."""
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line["excluded"] for line in lines if line["phase"] == "train"]

    def check_nothing_is_lost(self) -> None:
        """The run claims no less of anybody than its own ledger shows, and its directory holds what it claims."""
        run, result = RunDirectory.open(self.path).run_id, self.result
        finished = result["status"] in ("completed", "budget-exhausted")
        audit = audit_run(self.path, regenerate=regenerate)
        assert audit.findings == ()
        assert audit.verdict == ("consistent" if finished else "incomplete")
        for site in self.sites:
            if not site.ledger.is_file():
                continue
            claimed = result["clients"].get(site.name, {"epsilon": 0.0, "delta": 1e-5})
            spent = epsilon(events(site.entries, run), claimed.get("delta", 1e-5))
            assert claimed["epsilon"] >= spent - 1e-9, f"{site.name} spent more than the run says"


@pytest.fixture
def sites(
    tmp_path: Path, tiny_bert: Path, tiny_data: Path, tiny_toml: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Sites]:
    """Three clients (or others), each with a third of the data."""

    def make(*names: str) -> Sites:
        names = names or ("east", "north", "south")
        lines, found = tiny_data.read_text().splitlines(), []
        for i, name in enumerate(names):
            data = tmp_path / f"{name}.jsonl"
            data.write_text("\n".join(lines[i * 120 : (i + 1) * 120]) + "\n")
            text = CLIENT_FILE.format(name=name, home=tmp_path / "homes" / name, data=data, model=tiny_bert)
            file = ClientFile.parse(text, tmp_path)
            found.append(Site(file, OwnDesk(file)))
        clock = Clock()
        monkeypatch.setattr(strategies.server.exchange, "time", clock)
        monkeypatch.setattr(strategies.server.discovery, "time", clock)
        return Sites(found, clock, tmp_path / "run", tiny_toml, set(names))

    return make


@pytest.fixture
def faults() -> Any:
    """The names of this file, for tests that import nothing relative."""
    import sys

    return sys.modules[__name__]
