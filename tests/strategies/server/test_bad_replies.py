"""Nodes that fail, lie or send rubbish: named, counted, and never in the average."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Context, Message, MessageType

import clients.app
import fedlab
from fedlab.config import RunConfig
from fedlab.run import launch

Tamper = Callable[[Message], Message | None]


@pytest.fixture
def run_with(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run one round with three nodes of one client each; the reply of client-1 passes through ``tamper``."""

    def run(tamper: Tamper, *overrides: str) -> dict:
        def app(message: Message, context: Context) -> Message:
            mine = "client-1" in message.content.config_records["round"]["clients"]
            reply = clients.app.app(message, context)
            return tamper(reply) if mine and message.metadata.message_type == MessageType.TRAIN else reply

        real = launch.load_reference
        monkeypatch.setattr(launch, "load_reference", lambda r: app if r == launch.CLIENT_APP else real(r))
        config = RunConfig.parse(tiny_toml, ["run.rounds=1", "run.nodes=3", "run.cohort=1", *overrides])
        return fedlab.simulate(config, tmp_path / "run", quiet=True).result

    return run


def edit(change: Callable[[Message], None]) -> Tamper:
    def tamper(reply: Message) -> Message:
        change(reply)
        return reply

    return tamper


def poison(value: float) -> Callable[[Message], None]:
    def change(reply: Message) -> None:
        updates = reply.content.array_records["updates"]
        key = next(k for k in updates if k.startswith("client-1/"))
        array = updates[key].numpy().copy()
        array.flat[0] = value
        updates[key] = Array(array)

    return change


def reshape(reply: Message) -> None:
    updates = reply.content.array_records["updates"]
    key = next(k for k in updates if k.startswith("client-1/"))
    updates[key] = Array(updates[key].numpy().reshape(-1))


def as_double(reply: Message) -> None:
    updates = reply.content.array_records["updates"]
    key = next(k for k in updates if k.startswith("client-1/"))
    updates[key] = Array(updates[key].numpy().astype(np.float64))


def forget(reply: Message) -> None:
    updates = reply.content.array_records["updates"]
    del updates[next(iter(updates))]


def smuggle(reply: Message) -> None:
    reply.content.array_records["updates"]["client-1/base.weight"] = Array(np.zeros(3, dtype=np.float32))


def undecodable(reply: Message) -> None:
    updates = reply.content.array_records["updates"]
    key = next(k for k in updates if k.startswith("client-1/"))
    updates[key] = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=b"rubbish")


def undercharge(reply: Message) -> None:
    """Edit the signed event in the ledger lines."""
    charges = reply.content.config_records["charges"]
    lines = [json.loads(line) for line in charges["lines"][0].splitlines()]
    lines[0]["event"]["steps"] = 1
    charges["lines"] = ["".join(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n" for line in lines)]


def conceal(reply: Message) -> None:
    """Send the update and no ledger line at all."""
    reply.content.config_records["charges"]["lines"] = [""]


def swap(reply: Message) -> None:
    """Send another finite update than the one that was committed."""
    updates = reply.content.array_records["updates"]
    for key in updates:
        updates[key] = Array(updates[key].numpy() * 2)


def raise_error(reply: Message) -> None:
    raise RuntimeError("disk on fire")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (poison(float("nan")), "NaN"),
        (poison(float("inf")), "NaN or infinite"),
        (reshape, "shape"),
        (as_double, "float64"),
        (forget, "is missing"),
        (smuggle, "was not asked for"),
        (undecodable, "undecodable"),
        (lambda r: r.content.__delitem__("updates"), "malformed reply"),
        (lambda r: r.content.__delitem__("metrics"), "malformed reply"),
        (undercharge, "was edited, or signed by another key"),
        (conceal, "shows no charge for round 1"),
        (swap, "does not commit the update"),
        (raise_error, "disk on fire"),
    ],
)
def test_an_unusable_client_is_excluded_named_counted_and_charged(change, expected: str, run_with, tmp_path: Path):
    result = run_with(edit(change))
    assert result["status"] == "completed"
    assert result["excluded"] == 1
    (train,) = [
        json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"phase": "train"' in x
    ]
    assert list(train["excluded"]) == ["client-1"]
    assert expected in train["excluded"]["client-1"]
    assert train["clients"] == ["client-0", "client-2"]
    assert result["clients"]["client-1"]["epsilon"] > 0, "it may have spent, whatever it sent"


def test_a_reply_for_somebody_else_is_ignored(run_with):
    def impersonate(reply: Message) -> None:
        updates = reply.content.array_records["updates"]
        for key in list(updates):
            updates["client-0/" + key.partition("/")[2]] = Array(np.full(updates[key].shape, 1e6, dtype=np.float32))
        reply.content["failures"] = ConfigRecord(
            {"ids": ["client-2"], "reasons": ["said client-1"], "refused": ["client-2"]}
        )

    result = run_with(edit(impersonate))
    assert result["excluded"] == 0
    assert result["loss"] < 100


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
        run_with(edit(poison(float("nan"))), "run.min_clients=3")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert all(client["epsilon"] > 0 for client in result["clients"].values()), "a failed run has spent too"


def test_an_adapter_that_never_moves_is_an_error(run_with):
    def freeze(reply: Message) -> None:
        updates = reply.content.array_records["updates"]
        for key in updates:
            updates[key] = Array(np.zeros(updates[key].shape, dtype=np.float32))

    def app_for_all(reply: Message) -> Message:
        freeze(reply)
        return reply

    with pytest.raises(fedlab.RunFailed, match="no client changed the adapter"):
        run_with(app_for_all, "run.nodes=1", 'privacy={unit="none"}')
