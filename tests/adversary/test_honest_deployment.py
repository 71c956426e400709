"""Policies do not stand in the way of an honest run, and a client whose owner wrote none is left out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedlab
from fedlab.privacy.ledger.ledger import parse_lines
from fedlab.run.launch.local import LocalGrid


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bert: Path, tiny_data: Path, helpers: Any) -> Path:
    """Nodes of the local backend belong to owners of their own, in directories below the returned one; the last has no
    policy.
    """
    homes = tmp_path / "homes"
    original = LocalGrid.__init__

    def owned(self: LocalGrid, app: Any, nodes: int) -> None:
        original(self, app, nodes)
        for i, context in enumerate(self._contexts.values()):
            home = homes / str(i)
            home.mkdir(parents=True)
            (home / "policy.toml").write_text(helpers.POLICY.format(model=tiny_bert, data=tiny_data))
            own = {key: str(home / key) for key in ("ledger", "personal", "bases")}
            policy = {"policy": str(home / "policy.toml")} if i < nodes - 1 else {}
            context.node_config = {"client": f"client-{i}", "budget-epsilon": 40.0, **own, **policy}

    monkeypatch.setattr(LocalGrid, "__init__", owned)
    return homes


def test_an_honest_run_goes_to_its_end_without_the_client_that_has_no_policy(
    deployed: Path, tiny_toml: str, tmp_path: Path, helpers: Any
):
    config = helpers.config_of(tiny_toml, "run.nodes=3", "run.rounds=2", "evaluate.clients=never")
    result = fedlab.simulate(config, tmp_path / "run", quiet=True).result
    assert result["status"] == "completed"
    assert "policy" in result["clients"]["client-2"]["refused"]
    for i in (0, 1):
        entries = parse_lines((deployed / str(i) / "ledger" / f"client-{i}.jsonl").read_text())
        assert [entry["type"] for entry in entries].count("COMMIT") == 2
        assert entries[-1]["type"] == "CLOSE"
        assert {entry["kind"] for entry in entries if entry["type"] == "REFUSE"} == set()
        assert result["clients"][f"client-{i}"]["epsilon"] > 0
    assert not list(deployed.rglob("*.reply")), "answers that were kept for a repeat go when the run is closed"
    assert "has no policy" in (deployed / "2" / "ledger" / "log.txt").read_text()
    assert not (deployed / "2" / "ledger" / "client-2.jsonl").exists()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(set(json.loads(line).get("excluded", {})) == set() for line in metrics.splitlines())


def test_a_run_with_seeded_noise_ends_before_its_first_round(
    deployed: Path, tiny_toml: str, tmp_path: Path, helpers: Any
):
    config = helpers.config_of(tiny_toml, "run.nodes=2", "privacy.noise=seeded")
    with pytest.raises(fedlab.PrivacyError, match="on a machine of its own"):
        fedlab.simulate(config, tmp_path / "run", quiet=True)
    assert all(path.read_bytes() == b"" for path in deployed.rglob("*.jsonl")), "nothing was signed"
