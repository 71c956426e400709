"""Budgets, shared ledgers, rolled-back ledgers and client-level DP, in whole runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

import clients.answer
import fedlab
from fedlab.config import RunConfig
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.ledger.ledger import events, parse_lines


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, overrides), out, quiet=True)


def ledger(run: Path, owner: str) -> list[dict]:
    return parse_lines((run / "ledger" / f"{owner}.jsonl").read_text())


def types(run: Path, owner: str = "client-0") -> list[str]:
    return [entry["type"] for entry in ledger(run, owner)]


def test_every_round_is_planned_charged_committed_and_receipted(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=2")
    assert types(run.path) == ["PLAN", *["CHARGE", "COMMIT", "RELEASE"] * 2, "CLOSE"]
    receipts = parse_lines((run.path / "receipts.jsonl").read_text())
    assert [r["type"] for r in receipts] == ["START", *["ROUND", *["RECEIPT"] * 3] * 2, "FINAL"]
    for client, told in run.result["clients"].items():
        assert told["epsilon"] == pytest.approx(epsilon(events(ledger(run.path, client)), told["delta"]), rel=1e-9)
    assert not list(run.path.rglob("*.pem")), "the keys of a finished simulation are destroyed"
    assert (
        f"| client-0 | {math.ceil(run.result['clients']['client-0']['epsilon'] * 1e4) / 1e4:.4f} |"
        in (run.path / "PRIVACY.md").read_text()
    )


def test_clients_stop_at_their_budget_and_the_adapter_is_saved(tiny_toml: str, tmp_path: Path):
    free = simulate(tiny_toml, tmp_path / "free", "run.rounds=2")
    limit = free.result["epsilon"] * 1.001
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=5", f"privacy.budget.epsilon={limit}")
    assert (run.result["status"], run.result["rounds"]) == ("budget-exhausted", 2)
    assert run.result["epsilon"] <= limit
    assert all(c["participations"] == 2 for c in run.result["clients"].values()), "nobody is asked who cannot pay"
    assert run.result["adapter_digest"] == free.result["adapter_digest"], (
        "a limit changes when a run ends, not what it computes"
    )
    assert (run.path / "adapter" / "adapter_model.safetensors").is_file()
    assert sorted(types(run.path)[-3:-1]) == ["REFUSE", "RELEASE"]
    assert types(run.path)[-1] == "CLOSE"
    assert "refused round 3: budget-exhausted" in (run.path / "PRIVACY.md").read_text()


def test_the_run_goes_on_without_an_exhausted_client(tiny_toml: str, tmp_path: Path):
    """Clients of different sizes reach one limit in different rounds."""
    text = tiny_toml.replace("clients = 3", 'clients = 3\npartition = {kind = "linear"}')
    free = simulate(text, tmp_path / "free", "run.rounds=3")
    spent = sorted(c["epsilon"] for c in free.result["clients"].values())
    limit = (spent[0] + spent[-1]) / 2
    run = simulate(text, tmp_path / "run", "run.rounds=3", f"privacy.budget.epsilon={limit}")
    taken = {client: told["participations"] for client, told in run.result["clients"].items()}
    assert run.result["status"] == "completed"
    assert max(taken.values()) == 3
    assert min(taken.values()) < 3
    assert all(told["epsilon"] <= limit for told in run.result["clients"].values())


def test_a_budget_below_one_round_ends_with_exit_code_3_and_spends_nothing(tiny_toml: str, tmp_path: Path):
    with pytest.raises(
        fedlab.PrivacyError, match="0 clients can take part, 1 needed; client-0: budget-exhausted"
    ) as caught:
        simulate(tiny_toml, tmp_path / "run", "privacy.budget.epsilon=0.01")
    assert caught.value.exit_code == 3
    assert types(tmp_path / "run") == ["PLAN", "REFUSE"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


def test_a_second_run_on_the_same_data_starts_from_what_is_spent(tiny_toml: str, tmp_path: Path):
    shared = f"privacy.ledger={tmp_path / 'shared'}"
    alone = simulate(tiny_toml, tmp_path / "alone", "run.rounds=3")
    first = simulate(tiny_toml, tmp_path / "first", shared, "run.rounds=1")
    second = simulate(tiny_toml, tmp_path / "second", shared, "run.rounds=2", "run.seed=9", "data.seed=3")
    told = second.result["clients"]["client-0"]
    assert told["epsilon_before"] == pytest.approx(first.result["clients"]["client-0"]["epsilon"], rel=1e-9)
    assert told["epsilon"] == pytest.approx(alone.result["clients"]["client-0"]["epsilon"], rel=1e-3)
    assert types(second.path).count("PLAN") == 2, "the run directory holds a copy of the whole ledger"
    assert "up to 1 in these ledgers" in (second.path / "PRIVACY.md").read_text()
    limit = second.result["epsilon"] * 1.0001
    with pytest.raises(fedlab.PrivacyError, match="budget-exhausted"):
        simulate(tiny_toml, tmp_path / "third", shared, f"privacy.budget.epsilon={limit}")


def test_an_older_copy_of_a_shared_ledger_is_refused(tiny_toml: str, tmp_path: Path):
    shared = tmp_path / "shared"
    simulate(tiny_toml, tmp_path / "first", f"privacy.ledger={shared}", "run.rounds=1")
    (folder,) = [p for p in shared.iterdir() if p.is_dir()]
    shutil.copy(folder / "client-1.jsonl", tmp_path / "older")
    simulate(tiny_toml, tmp_path / "second", f"privacy.ledger={shared}", "run.rounds=1")
    shutil.copy(tmp_path / "older", folder / "client-1.jsonl")
    third = simulate(tiny_toml, tmp_path / "third", f"privacy.ledger={shared}", "run.rounds=1")
    assert "an older copy was put back" in third.result["clients"]["client-1"]["refused"]
    assert third.result["clients"]["client-1"]["participations"] == 0
    assert third.result["clients"]["client-0"]["participations"] == 1


def test_client_level_noise_is_charged_to_every_client_whether_drawn_or_not(tiny_toml: str, tmp_path: Path):
    text = tiny_toml.replace('unit = "example"', 'unit = "client"').replace(
        'name = "fedsvd"', 'name = "fedsvd"\nweights = "uniform"'
    )
    full = simulate(text, tmp_path / "full", "run.rounds=2", "privacy.sigma=3")
    expected = epsilon([Event("full", 1.0, 3.0, 2)], full.result["clients"]["client-0"]["delta"])
    assert [c["epsilon"] for c in full.result["clients"].values()] == pytest.approx([expected] * 3)
    assert types(full.path, "server") == ["PLAN", "CHARGE", "COMMIT", "CHARGE", "COMMIT", "CLOSE"]
    assert "one client with all its records" in (full.path / "PRIVACY.md").read_text()
    sampled = simulate(
        text, tmp_path / "poisson", "run.rounds=3", "privacy.sigma=3", "run.fraction=0.5", "run.sampling=poisson"
    )
    expected = epsilon([Event("poisson", 0.5, 3.0, 3)], sampled.result["clients"]["client-0"]["delta"])
    assert [c["epsilon"] for c in sampled.result["clients"].values()] == pytest.approx([expected] * 3)
    fixed = simulate(text, tmp_path / "fixed", "run.rounds=2", "privacy.sigma=3", "run.fraction=0.34")
    assert fixed.result["epsilon"] > full.result["epsilon"], (
        "a fixed-size draw amplifies nothing and moves the sum by 2C"
    )


def test_client_level_budget_ends_the_run(tiny_toml: str, tmp_path: Path):
    text = tiny_toml.replace('unit = "example"', 'unit = "client"').replace(
        'name = "fedsvd"', 'name = "ffa"\nweights = "uniform"'
    )
    limit = epsilon([Event("full", 1.0, 3.0, 2)], 1e-5) * 1.001
    run = simulate(
        text, tmp_path / "run", "run.rounds=5", "privacy.sigma=3", f"privacy.budget={{epsilon={limit}, delta=1e-5}}"
    )
    assert (run.result["status"], run.result["rounds"]) == ("budget-exhausted", 2)


def test_local_accuracy_is_the_simulators_and_a_client_refuses_to_send_it(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(clients.answer.ANSWERS, "evaluate", lambda *_: pytest.fail("a client was asked"))
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=1")
    assert run.result["client_scores"]["mean"] is not None
    monkeypatch.undo()
    shared = simulate(tiny_toml, tmp_path / "shared", "run.rounds=1", "privacy.share_metrics=true")
    assert shared.result["client_scores"] == run.result["client_scores"]
    assert "which `privacy.share_metrics` sent without noise" in (shared.path / "PRIVACY.md").read_text()


def test_without_dp_the_statement_promises_nothing(tiny_toml: str, tmp_path: Path):
    run = simulate(tiny_toml, tmp_path / "run", "run.rounds=1", 'privacy={unit="none"}')
    assert "no privacy guarantee" in (run.path / "PRIVACY.md").read_text()
    assert not (run.path / "receipts.jsonl").exists()
