"""A deployed client in this process, and a server that may send it anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clients.answer import answer as answered
from clients.serve import OwnDesk
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.lora.state import digest, from_wire, to_wire
from fedlab.models.adapters import initial_state
from fedlab.privacy.ledger.ledger import Entry, charged, parse_lines
from fedlab.protocol import Frame, decode, encode
from fedlab.protocol.fields import RunReference
from fedlab.protocol.messages import (
    NODE_FAILURE,
    REPLIES,
    REQUESTS,
    ClientOrder,
    DescribeRequest,
    EvaluateRequest,
    GramRequest,
    NodeFailure,
    ReceiptFor,
    ReceiptsRequest,
    Release,
    TrainRequest,
)
from fedlab.protocol.sum_messages import (
    ConfirmRequest,
    PrepareRequest,
    SumPlan,
    SumSetting,
    UnmaskOrder,
    UnmaskRequest,
)
from fedlab.session import open_session

RUN, OTHER_RUN, CLIENT = "a" * 32, "b" * 32, "client-0"
PARTS = ("head", "lora_B")
LABELS = ["fruit", "metal", "ocean"]
HARMLESS = ("size", "timing")  # public releases that any run makes

CLIENT_FILE = """
[client]
id = "{client}"
home = "{home}"
[data]
path = "{data}"
text = "text"
label = "topic"
[models."{model}"]
[policy]
min_sigma = 0.5
max_epsilon = 30.0
max_clip = 2.0
trained = ["lora_B", "head"]
[budget]
epsilon = 40.0
"""


def config_of(toml: str, *overrides: str) -> RunConfig:
    """The run that the client takes part in, with ``overrides``."""
    return RunConfig.parse(toml, ["privacy.noise=secure", f"objective.labels={json.dumps(LABELS)}", *overrides])


def reference(config: RunConfig, run: str = RUN) -> RunReference:
    return RunReference(run, hashlib.sha256(config.to_toml().encode()).hexdigest(), PARTS)


def describe(config: RunConfig, run: str = RUN) -> DescribeRequest:
    return DescribeRequest(reference(config, run), config.to_toml(), (CLIENT,), "/the/server/says")


@dataclass
class HostileServer:
    """Sends a client whatever it likes, and keeps what leaves the client that depends on its data."""

    file: ClientFile
    outputs: set[str] = field(default_factory=set)  # digests of what left
    bytes: list[bytes] = field(default_factory=list)  # all that left

    def __post_init__(self) -> None:
        self.desk = OwnDesk(self.file)

    @property
    def home(self) -> Path:
        """What the client keeps."""
        return self.file.home

    def send(self, request: Any) -> Any:
        """The reply to a request; what it releases is held against the ledger."""
        kind = {v: k for k, v in REQUESTS.items()}[type(request)]
        return self.send_frame(encode(kind, request))

    def send_frame(self, frame: Frame) -> Any:
        answer = answered(frame, self.desk)
        self.bytes.append(answer.header + answer.table + answer.body)
        reply: Any = decode(answer, {**REPLIES, NODE_FAILURE: NodeFailure})
        for release in releases_of(reply):
            if release.name not in HARMLESS:
                assert release.event is not None, f"{release.name} left without a charge"
                self.outputs.add(digest(from_wire(release.arrays)) if release.name == "update" else content_of(release))
        assert len(self.outputs) <= len(charged(self.entries)), "more left than was charged"
        committed = {entry["out"] for entry in self.entries if entry["type"] == "COMMIT"}
        assert self.outputs <= committed, "what left was not committed"
        return reply

    @property
    def entries(self) -> list[Entry]:
        """Lines of the client's ledger."""
        path = self.home / "ledger" / f"{CLIENT}.jsonl"
        return parse_lines(path.read_text()) if path.is_file() else []

    def kinds(self) -> list[str]:
        return [entry["type"] for entry in self.entries]

    @property
    def log(self) -> str:
        """The client's own log."""
        path = self.home / "ledger" / "log.txt"
        return path.read_text() if path.is_file() else ""


def content_of(release: Release) -> str:
    import torch

    return digest({name: torch.from_numpy(value.copy()) for name, value in release.arrays.items()})


def releases_of(reply: Any) -> list[Release]:
    """Everything in a reply that could hold data."""
    found = [release for mine in replies_of(reply) for release in getattr(mine, "releases", ())]
    whole = getattr(reply, "sum", None)
    return [*found, *([whole] if whole is not None else [])]


def replies_of(reply: Any) -> list[Any]:
    """The clients' parts of a reply."""
    return [getattr(mine, "reply", mine) for mine in getattr(reply, "clients", ())]


def codes_of(reply: Any) -> list[str]:
    """The codes of a reply that refuses; empty if it does not."""
    if isinstance(reply, NodeFailure):
        return [reply.code]
    return [mine.failure.code for mine in replies_of(reply) if mine.failure is not None]


def requests_of(config: RunConfig, model: RunConfig, run: str = RUN) -> dict[str, Any]:
    """One request of every kind, under ``config``; arrays as the model of ``model`` has them."""
    session = open_session(model.to_toml())
    state = initial_state(session.model, model.lora, 0)
    named, arrays = reference(config, run), to_wire(state)
    order = (ClientOrder(CLIENT, 0, model.lora.rank),)
    trained = tuple(name for name in state if not name.endswith("lora_A"))
    return {
        "describe": describe(config, run),
        "train": TrainRequest(named, 1, order, (1,), trained, (), "float32", arrays),
        "evaluate": EvaluateRequest(named, 1, (CLIENT,), (), "float32", arrays),
        "receipts": ReceiptsRequest(named, (ReceiptFor(CLIENT, 0, ""),)),
        **sum_requests_of(named),
        "gram": GramRequest(named, order, None, arrays),
    }


def sum_requests_of(named: RunReference) -> dict[str, Any]:
    """One request of every kind about a secure sum, which the client refuses."""
    plan = SumPlan(SumSetting("round-1-0", 2, 0, {CLIENT: "0" * 64, "client-1": "1" * 64}), {})
    return {
        "prepare": PrepareRequest(named, (CLIENT,), plan),
        "confirm": ConfirmRequest(named, (CLIENT,), "round-1-0", ("client-1",)),
        "unmask": UnmaskRequest(named, "round-1-0", (UnmaskOrder(CLIENT, {}),), (), {}),
    }


@pytest.fixture
def server(tmp_path: Path, tiny_bert: Path, tiny_data: Path) -> Callable[..., HostileServer]:
    """A server before a client with a file of its own, whose text ``changes`` replace parts of."""

    def start(changes: Mapping[str, str] | None = None) -> HostileServer:
        text = CLIENT_FILE.format(client=CLIENT, home=tmp_path, model=tiny_bert, data=tiny_data)
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        return HostileServer(ClientFile.parse(text, tmp_path))

    return start


@pytest.fixture
def helpers() -> Any:
    """The functions of this file, for tests that import nothing relative."""
    import sys

    return sys.modules[__name__]
