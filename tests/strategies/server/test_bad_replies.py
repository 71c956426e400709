"""Nodes that fail, lie or send rubbish: named, counted, and never in the average."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType

import clients.app
import fedlab
from fedlab.config import RunConfig
from fedlab.privacy.release import METRICS, UPDATE
from fedlab.protocol import Frame, decode, encode
from fedlab.protocol.fields import Failure
from fedlab.protocol.messages import REPLIES, REQUESTS, ClientReply, Release, TrainReply
from fedlab.run import launch

RECORD = clients.app.RECORD
Edit = Callable[[ClientReply], ClientReply]
Tamper = Callable[[Message], Message | None]


def frame_of(message: Message) -> Frame:
    fields: dict[str, Any] = dict(message.content.config_records[RECORD])
    return Frame(**fields)


@pytest.fixture
def run_with(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run one round with three nodes of one client each; the reply of client-1 passes through ``tamper``."""
    real = launch.load_reference

    def run(tamper: Tamper, *overrides: str, out: str = "run") -> dict:
        def app(message: Message, context: Context) -> Message:
            training = message.metadata.message_type == MessageType.TRAIN
            asked = [entry.client for entry in decode(frame_of(message), REQUESTS).clients] if training else []
            reply = clients.app.app(message, context)
            return tamper(reply) if "client-1" in asked else reply

        monkeypatch.setattr(launch, "load_reference", lambda r: app if r == launch.CLIENT_APP else real(r))
        config = RunConfig.parse(tiny_toml, ["run.rounds=1", "run.nodes=3", "run.cohort=1", *overrides])
        return fedlab.simulate(config, tmp_path / out, quiet=True).result

    return run


def whole(change: Callable[[TrainReply], TrainReply]) -> Tamper:
    """The reply of the node as ``change`` makes it."""

    def tamper(message: Message) -> Message:
        frame = encode("train", change(decode(frame_of(message), REPLIES)))
        message.content.config_records[RECORD] = ConfigRecord(vars(frame))
        return message

    return tamper


def edit(change: Edit) -> Tamper:
    """Each client's part of the reply as ``change`` makes it."""
    return whole(lambda reply: replace(reply, clients=tuple(map(change, reply.clients))))


def arrays(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Tamper:
    """Other arrays in the update."""

    def changed(release: Release) -> Release:
        return replace(release, arrays=change(dict(release.arrays))) if release.name == UPDATE else release

    return edit(lambda reply: replace(reply, releases=tuple(map(changed, reply.releases))))


def first(change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    """Another first array in the update."""

    def of(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = next(iter(found))
        return found | {name: change(found[name].copy())}

    return arrays(of)


def poison(value: float) -> Tamper:
    def change(array: np.ndarray) -> np.ndarray:
        array.flat[0] = value
        return array

    return first(change)


def lines(change: Callable[[str], str]) -> Tamper:
    return edit(lambda reply: replace(reply, lines=change(reply.lines or "")))


def undercharged(text: str) -> str:
    """The signed event in the ledger lines edited."""
    entries = [json.loads(line) for line in text.splitlines()]
    entries[0]["event"]["steps"] = 1
    return "".join(json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n" for entry in entries)


def raw(**parts: Any) -> Tamper:
    """Other bytes in the frame."""

    def tamper(message: Message) -> Message:
        message.content.config_records[RECORD] = ConfigRecord({**vars(frame_of(message)), **parts})
        return message

    return tamper


def no_frame(message: Message) -> Message:
    del message.content[RECORD]
    return message


def raise_error(message: Message) -> Message:
    raise RuntimeError("disk on fire")


def other_event(reply: ClientReply) -> ClientReply:
    release = reply.release(UPDATE)
    assert release is not None
    assert release.event is not None
    cheaper = replace(release, event=replace(release.event, sigma=99.0))
    return replace(reply, releases=(cheaper, *reply.releases[1:]))


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (poison(float("nan")), "NaN"),
        (poison(float("inf")), "NaN or infinite"),
        (first(lambda a: a.reshape(-1)), "shape"),
        (first(lambda a: a.astype(np.int64)), "bytes, at most"),
        (arrays(lambda found: dict(list(found.items())[1:])), "is missing"),
        (arrays(lambda found: found | {"base.weight": np.zeros(3, np.float32)}), "was not asked for"),
        (edit(lambda r: replace(r, releases=(*r.releases, Release("labels", {}, {"mean": 1.0})))), "not asked for"),
        (
            edit(lambda r: replace(r, releases=(*r.releases, Release(METRICS, {"x": np.zeros(2, np.float32)})))),
            "holds arrays",
        ),
        (edit(lambda r: replace(r, releases=())), "update: is missing"),
        (edit(other_event), "not what it declared"),
        (whole(lambda r: replace(r, clients=())), "does not name it"),
        (raw(header=b"rubbish"), "malformed reply: header"),
        (raw(body=b"rubbish"), "malformed reply: body"),
        (raw(table=b"[]"), "malformed reply: body"),
        (raw(kind="gram"), "malformed reply: kind"),
        (raw(body=bytes(10**6)), "malformed reply: body: 1000000 bytes, at most"),
        (no_frame, "malformed reply: record"),
        (lines(undercharged), "was edited, or signed by another key"),
        (lines(lambda text: ""), "shows no charge for round 1"),
        (arrays(lambda found: {name: value * 2 for name, value in found.items()}), "does not commit the update"),
        (raise_error, "disk on fire"),
    ],
)
def test_an_unusable_client_is_excluded_named_counted_and_charged(tamper, expected: str, run_with, tmp_path: Path):
    result = run_with(tamper)
    assert result["status"] == "completed"
    assert result["excluded"] == 1
    (train,) = [
        json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"phase": "train"' in x
    ]
    assert list(train["excluded"]) == ["client-1"]
    assert expected in train["excluded"]["client-1"]
    assert train["clients"] == ["client-0", "client-2"]
    assert result["clients"]["client-1"]["epsilon"] > 0, "it may have spent, whatever it sent"


def test_a_client_weighs_what_it_declared_whatever_size_comes_with_its_update(run_with, tmp_path: Path):
    """A million examples in every release of the reply: the model and the mean loss stay as they are, to the bit."""

    def boast(reply: ClientReply) -> ClientReply:
        return replace(
            reply, releases=tuple(replace(r, numbers={**r.numbers, "examples": 1e6}) for r in reply.releases)
        )

    setting = "privacy={unit='none'}"
    honest = run_with(lambda message: message, setting, out="honest")
    result = run_with(edit(boast), setting)
    assert result["excluded"] == 0
    assert result["adapter_digest"] == honest["adapter_digest"]
    assert result["clients"] == honest["clients"]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").open() if '"phase": "train"' in line]
        for run in ("honest", "run")
    ]
    assert losses[0] == losses[1]


def test_a_reply_for_somebody_else_is_ignored(run_with):
    def impersonate(reply: TrainReply) -> TrainReply:
        (mine,) = reply.clients
        huge = {name: np.full(a.shape, 1e6, np.float32) for name, a in mine.releases[0].arrays.items()}
        other = replace(mine, client="client-0", releases=(Release(UPDATE, huge),))
        failed = ClientReply("client-2", failure=Failure("failed", refused=True))
        return replace(reply, clients=(other, mine, failed))

    result = run_with(whole(impersonate), "privacy={unit='none'}")
    assert result["excluded"] == 1, "more bytes than one client may send"
    assert result["scores"]["loss"] < 100


def test_a_failure_that_somebody_else_reports_is_ignored(run_with):
    failed = ClientReply("client-2", failure=Failure("failed", refused=True))
    result = run_with(whole(lambda reply: replace(reply, clients=(failed, *reply.clients))))
    assert result["excluded"] == 0
    assert "refused" not in result["clients"]["client-2"]


def test_a_node_that_does_not_answer_is_named(run_with, monkeypatch: pytest.MonkeyPatch):
    from fedlab.run.launch.local import LocalGrid

    original = LocalGrid._handle
    monkeypatch.setattr(
        LocalGrid,
        "_handle",
        lambda self, m: (
            None if m.metadata.dst_node_id == 11 and m.metadata.message_type == "train" else original(self, m)
        ),
    )
    pull = LocalGrid.pull_messages
    monkeypatch.setattr(LocalGrid, "pull_messages", lambda self, ids: [r for r in pull(self, ids) if r is not None])
    result = run_with(lambda reply: reply, "run.timeout=15")
    assert result["excluded"] == 1


def test_too_few_usable_updates_fail_the_run(run_with, tmp_path: Path):
    with pytest.raises(fedlab.RunFailed, match=r"2 usable updates, 3 needed \(client-1"):
        run_with(poison(float("nan")), "run.min_clients=3")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert all(client["epsilon"] > 0 for client in result["clients"].values()), "a failed run has spent too"


def test_an_adapter_that_never_moves_is_an_error(run_with):
    still = arrays(lambda found: {name: np.zeros(a.shape, np.float32) for name, a in found.items()})
    with pytest.raises(fedlab.RunFailed, match="no client changed the adapter"):
        run_with(still, "run.nodes=1", 'privacy={unit="none"}')
