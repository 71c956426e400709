"""Clients that have names: a hospital is found under its own name in everything that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.identifiers import identifier
from fedlab.privacy.audit.run import audit_run

NAMES = ["hospA", "St. Mary's", "01"]
IDS = ["01", "hospA", identifier("St. Mary's")]  # in client order
NATURAL = "data.partition={kind='natural', column='site'}"


@pytest.fixture
def named_toml(tiny_toml: str, tiny_data: Path, tmp_path: Path) -> str:
    """``tiny_toml`` on a table whose column ``site`` names three clients, their number left to it."""
    rows = [json.loads(line) for line in tiny_data.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "named.jsonl"
    path.write_text("\n".join(json.dumps(row | {"site": NAMES[i % 3]}) for i, row in enumerate(rows)))
    return tiny_toml.replace(str(tiny_data), str(path)).replace("clients = 3\n", "")


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, [NATURAL, *overrides]), out, quiet=True)


def test_a_client_has_its_own_name_in_every_file(named_toml: str, tmp_path: Path):
    run = simulate(named_toml, tmp_path / "run", 'clients.rank={hospA=2, "St. Mary\'s"=1}')
    assert list(run.result["clients"]) == IDS
    assert [client["rank"] for client in run.result["clients"].values()] == [4, 2, 1]
    assert sorted(file.stem for file in (run.path / "ledger").glob("*.jsonl")) == sorted(IDS)
    partition = json.loads((run.path / "partition.json").read_text())["clients"]
    assert [entry.get("name", client) for client, entry in partition.items()] == ["01", "hospA", "St. Mary's"]
    for name in ("PRIVACY.md", "report.html"):
        assert all(client in (run.path / name).read_text() for client in IDS), name
    assert RunConfig.load(run.path / "run.toml").data.clients == 3
    assert not audit_run(run.path).findings


def test_what_a_client_keeps_lies_under_its_name(named_toml: str, tmp_path: Path):
    run = simulate(named_toml, tmp_path / "run", "strategy.name=fedsa", "run.rounds=1", "privacy={unit='none'}")
    assert sorted(folder.name for folder in (run.path / "personal").iterdir()) == sorted(IDS)


def test_the_number_of_named_clients_is_checked_like_any_other(named_toml: str, tmp_path: Path):
    with pytest.raises(fedlab.ConfigError, match=r"run\.min_clients = 4 can never be reached: 3 of 3"):
        simulate(named_toml, tmp_path / "run", "run.min_clients=4")
    with pytest.raises(fedlab.ConfigError, match=r"data\.clients = 5, but column 'site' names 3"):
        simulate(named_toml, tmp_path / "run", "data.clients=5")
    with pytest.raises(
        fedlab.ConfigError, match=r"clients\.lr: hospB is none of the 3 clients; they are 01, hospA, St"
    ):
        simulate(named_toml, tmp_path / "run", "clients.lr={hospB=2.0}")
    assert not (tmp_path / "run").exists()


def test_a_name_that_differs_between_tasks_of_a_stream_is_refused(named_toml: str, tmp_path: Path):
    other = tmp_path / "other.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "named.jsonl").read_text().splitlines()]
    other.write_text("\n".join(json.dumps(row | {"site": row["site"].replace("hospA", "hospB")}) for row in rows))
    tasks = f'\n[[tasks]]\nname = "a"\n[[tasks]]\nname = "b"\ndata = {{path = \'{other}\'}}\n'
    with pytest.raises(fedlab.ConfigError, match="hospB has examples of b and none of a"):
        simulate(named_toml + tasks, tmp_path / "run", "strategy.name=osft", "privacy={unit='none'}")
