"""Masked rounds: the same bits as without masks, whoever drops out where; what cannot be unmasked releases nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import clients.answer
import clients.secure_sum
import clients.train
import fedlab
from fedlab.config import RunConfig
from fedlab.errors import RunFailed
from fedlab.privacy.audit.run import audit_run
from fedlab.protocol.messages import TrainRequest

pytestmark = pytest.mark.usefixtures("drawn_once")
SHARED = ("privacy.survivors=2", "train.steps=1", "train.sampling_rate=0.2", "train.momentum=0")
MASKED = "privacy.masked=true"


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, [*SHARED, *overrides]), out, quiet=True)


def rounds(run: Path) -> list[dict[str, Any]]:
    found = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["phase"] == "train"]


def failing(patch: pytest.MonkeyPatch, step: str, client: str, number: int) -> None:
    """Let a client fail where it masks, or reveals, in one round."""
    if step == "mask":
        hide = clients.train.hide

        def hidden(owner: Any, values: Any, run: str, subject: Any, order: Any) -> Any:
            if (owner.client, subject) == (client, ("round", number)):
                raise OSError("made up")
            return hide(owner, values, run, subject, order)

        patch.setattr(clients.train, "hide", hidden)
        return
    reveal = clients.secure_sum._reveal

    def revealed(node: Any, order: Any, request: Any) -> Any:
        if order.client == client and request.name.startswith(f"round-{number}-"):
            order = type(order)("nobody", {})
        return reveal(node, order, request)

    patch.setattr(clients.secure_sum, "_reveal", revealed)


@pytest.mark.parametrize("nodes", [1, 3])
def test_masks_cancel_to_the_bit(nodes: int, tiny_toml: str, tmp_path: Path):
    plain = simulate(tiny_toml, tmp_path / "plain")
    run = simulate(tiny_toml, tmp_path / "masked", MASKED, f"run.nodes={nodes}")
    assert run.result["status"] == "completed"
    assert run.result["adapter_digest"] == plain.result["adapter_digest"]
    assert run.result["bytes_up"] == plain.result["bytes_up"]
    assert not audit_run(run.path).findings


def test_no_share_leaves_a_masked_run_unmasked(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that leaves the keys out gets nothing, and nothing is charged for it."""
    from strategies.server.shared_round import SumMessenger

    monkeypatch.setattr(SumMessenger, "prepared", lambda self, number, drawn: drawn)
    monkeypatch.setattr(SumMessenger, "finish", lambda self, number, outcome: None)
    order = SumMessenger.order_training

    def without(self: SumMessenger, *arguments: Any) -> Any:
        self.sums = None
        return order(self, *arguments)

    monkeypatch.setattr(SumMessenger, "order_training", without)
    with pytest.raises(RunFailed, match="3 rounds one after another"):
        simulate(tiny_toml, tmp_path / "run", MASKED)
    ledger = (tmp_path / "run" / "ledger" / "client-0.jsonl").read_text()
    assert "CHARGE" not in ledger


@pytest.mark.parametrize("step", ["mask", "reveal"])
def test_a_client_that_drops_out_is_left_out_or_not_missed(
    step: str, tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        failing(patch, step, "client-1", 2)
        run = simulate(tiny_toml, tmp_path / "run", MASKED)
    assert (run.result["status"], run.result["unreleased_rounds"]) == ("completed", 0)
    used = ["client-0", "client-2"] if step == "mask" else ["client-0", "client-1", "client-2"]
    assert rounds(run.path)[1]["clients"] == used
    assert not audit_run(run.path).findings
    if step == "reveal":
        assert run.result["adapter_digest"] == simulate(tiny_toml, tmp_path / "plain").result["adapter_digest"]


def test_what_too_few_unmask_is_not_released(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        for client in ("client-0", "client-1"):
            failing(patch, "reveal", client, 2)
        run = simulate(tiny_toml, tmp_path / "run", MASKED)
    assert (run.result["status"], run.result["unreleased_rounds"]) == ("completed", 1)
    assert [line["released"] for line in rounds(run.path)] == [True, False, True]
    assert not audit_run(run.path).findings


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_a_masked_round_that_was_cut_off_is_lost_and_the_run_goes_on(
    noise: str, tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = [MASKED, f"privacy.noise={noise}"]
    with monkeypatch.context() as patch:
        patch.setattr("strategies.server.shared_round.SumMessenger.finish", _cut_off(2))
        with pytest.raises(RunFailed, match="made up"):
            simulate(tiny_toml, tmp_path / "run", *settings)
    run = fedlab.resume(tmp_path / "run", quiet=True)
    assert (run.result["status"], run.result["unreleased_rounds"]) == ("completed", 1)
    assert [line["released"] for line in rounds(run.path)] == [True, False, True]
    assert all(c["participations"] == 3 for c in run.result["clients"].values())
    assert not audit_run(run.path).findings


def _cut_off(number: int) -> Any:
    from strategies.server.shared_round import SumMessenger

    finish = SumMessenger.finish

    def cut(self: SumMessenger, round_number: int, outcome: Any) -> None:
        if round_number == number:
            raise RuntimeError("made up")
        finish(self, round_number, outcome)

    return cut


def test_two_exchanges_a_round(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After the first round, which is prepared by itself: train, and unmask with the next one's preparation."""
    asked: list[str] = []
    exchange = clients.answer.answer

    def counted(frame: Any, desk: Any) -> Any:
        asked.append(frame.kind)
        return exchange(frame, desk)

    monkeypatch.setattr("clients.app.answered", counted)
    simulate(tiny_toml, tmp_path / "run", MASKED)
    beside = ("describe", "receipts", "evaluate")
    assert [kind for kind in asked if kind not in beside] == ["prepare", *["train", "unmask"] * 3]
    assert TrainRequest.__dataclass_fields__["sum"].default is None
