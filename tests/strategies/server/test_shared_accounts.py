"""What the server makes of the shares of noise that clients signed: one that signed others takes no part."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import fedlab
from clients.account import ClientAccount
from fedlab.config import RunConfig
from fedlab.errors import ConfigError, PrivacyError, RunFailed
from fedlab.privacy import noise_share
from fedlab.privacy.audit.run import audit_run

SHARED = ("privacy.survivors=2", "train.steps=1", "train.sampling_rate=0.2", "train.momentum=0", "run.rounds=1")


def signs(monkeypatch: pytest.MonkeyPatch, client: str, **change: Any) -> None:
    """Let one client sign something else of its shares."""
    original = ClientAccount.__init__

    def made(self: ClientAccount, *arguments: Any) -> None:
        original(self, *arguments)
        if self.client == client:
            self.terms = {**self.terms, "shared": {**self.terms["shared"], **change}}

    monkeypatch.setattr(ClientAccount, "__init__", made)


@pytest.mark.parametrize("change", [{"share": (1.0).hex()}, {"survivors": 3}, {"dimension": 1}], ids=str)
def test_who_signs_other_shares_than_the_rest_takes_no_part(
    change: dict[str, Any], tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each one's claim rests on the others' shares; the audit names it too."""
    signs(monkeypatch, "client-1", **change)
    run = fedlab.simulate(RunConfig.parse(tiny_toml, SHARED), tmp_path / "run", quiet=True)
    lines = (run.path / "ledger" / "client-1.jsonl").read_text().splitlines()
    assert "CHARGE" not in [json.loads(line)["type"] for line in lines]
    assert run.result["clients"]["client-1"]["participations"] == 0
    assert run.result["clients"]["client-0"]["participations"] == 1
    assert any("client-1" in str(finding) for finding in audit_run(run.path).findings)


def test_a_sum_that_could_overflow_is_refused_before_anything_is_charged(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(noise_share, "WORD", 24)
    with pytest.raises((ConfigError, RunFailed, PrivacyError), match=r"there is room for|its log says why"):
        fedlab.simulate(RunConfig.parse(tiny_toml, SHARED), tmp_path / "run", quiet=True)
    ledgers = (tmp_path / "run" / "ledger").glob("client-*.jsonl")
    assert not any("CHARGE" in path.read_text() for path in ledgers)


def test_the_noise_of_a_run_is_that_of_its_sums(tiny_toml: str, tmp_path: Path):
    """Three shares of 1/2 of the variance each, over one step on the gradients of all records."""
    run = fedlab.simulate(RunConfig.parse(tiny_toml, [*SHARED, "privacy.sigma=1.5"]), tmp_path / "run", quiet=True)
    plans = [json.loads(path.read_text().splitlines()[0]) for path in sorted((run.path / "ledger").glob("*-?.jsonl"))]
    coordinates, records = plans[0]["shared"]["dimension"], sum(plan["n"] for plan in plans)
    expected = 1.5 * math.sqrt(3 / 2) / (0.2 * records) * math.sqrt(coordinates)
    assert run.result["noise_ratio"] == pytest.approx(expected)
