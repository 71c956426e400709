"""An honest run with clients on machines of their own, in one process: it goes to its end, and its server holds no
data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedlab
import fedlab.data.opening
from fedlab.config.client import ClientFile
from fedlab.privacy.ledger.ledger import parse_lines
from fedlab.run.audit import audit_directory
from fedlab.run.deployment import Deployment
from fedlab.run.launch import deploy_run


@pytest.fixture
def homes(tmp_path: Path) -> Path:
    """Where clients keep what is their own, a directory each."""
    return tmp_path / "homes"


@pytest.fixture
def backend(homes: Path, tiny_bert: Path, tiny_data: Path, helpers: Any, carried: Any) -> Callable[..., Any]:
    """What carries messages to so many clients, each with its own file, in this process; ``changes``: client → text of
    its file → another text.
    """

    def make(count: int, changes: Any = None) -> Any:
        files = []
        for i in range(count):
            home = homes / str(i)
            text = helpers.CLIENT_FILE.format(client=f"client-{i}", home=home, model=tiny_bert, data=tiny_data)
            files.append(ClientFile.parse((changes or {}).get(i, lambda text: text)(text), homes))
        return carried(files)

    return make


DEPLOYMENT = Deployment(server="here", wait=0.0)


def test_an_honest_run_goes_to_its_end_without_the_client_that_does_not_allow_it(
    backend: Any, homes: Path, tiny_toml: str, tmp_path: Path, helpers: Any, monkeypatch: pytest.MonkeyPatch
):
    def opened(*_: object) -> None:
        raise AssertionError("the server opened the clients' corpus")

    monkeypatch.setattr(fedlab.data.opening, "_corpus_and_shards", opened)
    config = helpers.config_of(tiny_toml, "data.clients=3", "run.rounds=2", "evaluate.clients=never")
    carry = backend(3, {2: lambda text: text.replace("max_epsilon = 30.0", "max_epsilon = 0.01")})
    result = deploy_run(config, DEPLOYMENT, tmp_path / "run", quiet=True, backend=carry).result
    assert result["status"] == "completed"
    assert result["scores"] is None
    assert "policy" in result["clients"]["client-2"]["refused"]
    for i in (0, 1):
        entries = parse_lines((homes / str(i) / "ledger" / f"client-{i}.jsonl").read_text())
        assert [entry["type"] for entry in entries].count("COMMIT") == 2
        assert entries[-1]["type"] == "CLOSE"
        assert {entry["kind"] for entry in entries if entry["type"] == "REFUSE"} == set()
        assert result["clients"][f"client-{i}"]["epsilon"] > 0
    assert not list(homes.rglob("*.reply")), "answers that were kept for a repeat go when the run is closed"
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(set(json.loads(line).get("excluded", {})) == set() for line in metrics.splitlines())
    assert audit_directory(tmp_path / "run", None, [], False) == 0


def test_a_run_with_seeded_noise_ends_before_its_first_round(
    backend: Any, homes: Path, tiny_toml: str, tmp_path: Path, helpers: Any
):
    config = helpers.config_of(tiny_toml, "privacy.noise=seeded")
    with pytest.raises(fedlab.PrivacyError, match="on machines of their own"):
        deploy_run(config, DEPLOYMENT, tmp_path / "run", quiet=True, backend=backend(2))
    assert not list(homes.rglob("*.jsonl")), "nothing was signed"
