"""A finite update far outside the round's norms: named, measured, left out, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from strategies.server.outcome import TrainOutcome
from strategies.server.outliers import set_outliers_aside


def outcome_of(**sizes: float) -> TrainOutcome:
    zeros = torch.zeros(2, 1)
    updates = {name: {"head.w": torch.full((4,), size / 2), "m.lora_B": zeros} for name, size in sizes.items()}
    return TrainOutcome(updates=updates, metrics={name: {"examples": 9.0} for name in sizes})


@pytest.mark.parametrize(
    ("sizes", "factor", "gone"),
    [
        ({"a": 1.0, "b": 2.0, "c": 1e7}, 1000, {"c"}),
        ({"a": 1.0, "b": 2.0, "c": 1999.0}, 1000, set()),
        ({"a": 1.0, "b": 2.0, "c": 2001.0}, 1000, {"c"}),
        ({"a": 1.0, "b": 2.0, "c": 8.0}, 4, set()),  # at the limit, exactly
        ({"a": 1.0, "b": 1.0, "c": 1e19, "d": 1e19, "e": 1.0}, 1000, {"c", "d"}),
        ({"a": 1.0, "c": 1e7}, 1000, set()),  # of two, which?
        ({"a": 0.0, "b": 0.0, "c": 1.0}, 1000, set()),  # most did not move: nothing to compare with
        ({"a": 1.0, "b": 2.0, "c": 1e30}, 0, set()),
    ],
)
def test_who_is_left_out(sizes: dict[str, float], factor: float, gone: set[str]):
    outcome = outcome_of(**sizes)
    set_outliers_aside(outcome, factor)
    assert outcome.excluded.keys() == gone
    assert outcome.updates.keys() == outcome.metrics.keys() == sizes.keys() - gone
    assert outcome.unusable == len(gone), "robust rules count it among the hostile"
    for client, metrics in outcome.metrics.items():
        assert metrics["norm"] == pytest.approx(sizes[client])
    assert all("run.outlier" in reason and "learning rate" in reason for reason in outcome.excluded.values())


def run_of(toml: str, out: Path, *overrides: str) -> tuple[fedlab.Run, list[dict]]:
    run = fedlab.simulate(RunConfig.parse(toml, ["run.rounds=2", *overrides]), out, quiet=True)
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return run, [line for line in found if line["phase"] == "train"]


@pytest.mark.parametrize("privacy", ["", "privacy={unit='none'}"])
@pytest.mark.parametrize("strategy", ["fedsvd", "fedavg", "flora"])
def test_a_client_that_diverges_to_numbers_takes_nobody_with_it(
    privacy: str, strategy: str, tiny_toml: str, tmp_path: Path
):
    own = ["clients.lr={client-1=1e6}", f"strategy.name={strategy}", *([privacy] if privacy else [])]
    run, rounds = run_of(tiny_toml, tmp_path / "run", *own)
    assert run.result["status"] == "completed"
    assert run.result["scores"]["loss"] < 10
    for line in rounds:
        assert "times the round's median" in line["excluded"]["client-1"]
        assert line["clients"] == ["client-0", "client-2"]
        assert all(0 < line["per_client"][c]["norm"] < 100 for c in line["clients"])
    if not privacy:
        assert run.result["clients"]["client-1"]["epsilon"] > 0, "what it spent is spent"
        assert fedlab_audit(run) == 0


def fedlab_audit(run: fedlab.Run) -> int:
    from fedlab.privacy.audit.run import audit_run

    return len(audit_run(run.path).findings)


@pytest.mark.parametrize("privacy", ["", "privacy={unit='none'}"])
def test_a_run_without_an_outlier_keeps_its_bits(privacy: str, tiny_toml: str, tmp_path: Path):
    own = ["clients.lr={client-1=20}", *([privacy] if privacy else [])]
    with_limit, rounds = run_of(tiny_toml, tmp_path / "a", *own)
    without, _ = run_of(tiny_toml, tmp_path / "b", "run.outlier=0", *own)
    assert with_limit.result["adapter_digest"] == without.result["adapter_digest"]
    assert not any(line["excluded"] for line in rounds)


def test_under_client_level_dp_the_clip_bounds_it_and_nobody_is_left_out(tiny_toml: str, tmp_path: Path):
    unit = "privacy={unit='client',sigma=1.0,clip=1.0}"
    own = ["clients.lr={client-1=1e6}", "strategy.name=fedavg", "strategy.weights=uniform"]
    run, rounds = run_of(tiny_toml, tmp_path / "run", unit, *own)
    assert run.result["excluded"] == 0
    assert not any("norm" in metrics for line in rounds for metrics in line["per_client"].values())
