"""``PRIVACY.md`` against ledgers that are known: every number of its table, and what it lists."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlab.privacy.accounting import DISCRETE, Event, epsilon, optimistic
from fedlab.privacy.noise_share import NoiseShare
from fedlab.privacy.promise import rounded_up
from fedlab.privacy.statement import statement

spec = importlib.util.spec_from_file_location("ledgers", Path(__file__).with_name("ledgers.py"))
ledgers: Any = importlib.util.module_from_spec(spec)
sys.modules["ledgers"] = ledgers
spec.loader.exec_module(ledgers)

EARLIER = "ee" * 16
SHARED = """
survivors = 3
colluding = 1
[data]
clients = 3
"""
ROUND, BEFORE = Event("poisson", 0.02, 1.0, 10), Event("poisson", 0.02, 1.0, 10)
TEXT = """
[run]
name = "t"
rounds = 2
[lora]
rank = 2
alpha = 4
[train]
lr = 0.1
steps = 10
[strategy]
weights = "uniform"
[privacy]
unit = "{unit}"
sigma = 1.0
clip = 1.0
noise = "secure"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Client 0 was in an earlier run, which it refused to go on with; 1 has another δ; 2 did one round of two."""
    budget = {"epsilon": (4.0).hex(), "delta": (1e-5).hex()}
    happens = ledgers.event(0.02, 1.0, 10)
    for name in ("client-0", "client-1", "client-2"):
        file = ledgers.File(name)
        if name == "client-0":
            file.run = EARLIER
            file.plan(happens)
            file.commit(file.charge(1))
            file.add("REFUSE", round=2, kind="policy", reason="an old matter")
            file.run = ledgers.RUN
        delta = (1e-7 if name == "client-1" else 1e-5).hex()
        file.plan(happens, delta=delta, budget=budget if name == "client-2" else None)
        for number in (1, 2) if name != "client-2" else (1,):
            file.commit(file.charge(number))
        if name == "client-2":
            file.add("REFUSE", round=2, kind="budget-exhausted", reason="no more")
        (tmp_path / "ledger").mkdir(exist_ok=True)
        (tmp_path / "ledger" / f"{name}.jsonl").write_bytes(file.bytes)
    (tmp_path / "run.toml").write_text(TEXT.format(unit="example"))
    (tmp_path / "environment.json").write_text(json.dumps({"run_id": ledgers.RUN}))
    return tmp_path


def told(*clients: str) -> dict[str, dict[str, object]]:
    """What ``result.json`` says of them: nothing that is not in their ledgers."""
    return {client: {} for client in clients}


def rows(text: str) -> dict[str, list[str]]:
    found = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| client-")
    ]
    return {row[0]: row[1:] for row in found}


def up(events: list[Event], delta: float) -> str:
    return rounded_up(epsilon(events, delta))


def test_every_number_of_the_table_is_that_of_the_ledger(root: Path):
    found = rows(statement(root, told("client-0", "client-1", "client-2")))
    plain = Event("full", 1.0, 1.0, 10)
    assert found == {
        "client-0": [up([ROUND] * 3, 1e-5), "1e-05", "2", up([BEFORE], 1e-5), up([plain] * 3, 1e-5), "–"],
        "client-1": [up([ROUND] * 2, 1e-7), "1e-07", "2", "0.0000", up([plain] * 2, 1e-7), "–"],
        "client-2": [up([ROUND], 1e-5), "1e-05", "1", "0.0000", up([plain], 1e-5), "4"],
    }


def test_the_promise_is_the_largest_epsilon_and_names_a_delta_only_if_it_is_everybodys(root: Path):
    text = statement(root, told("client-0", "client-1", "client-2"))
    shown = [float(row[0]) for row in rows(text).values()]
    assert max(shown) > statistics.median(shown)
    assert f"the largest ε over the clients is **{max(shown):.4f}** at each client's δ below" in text
    assert "at δ = 1e-05" in statement(root, told("client-0", "client-2"))


def test_refusals_are_this_runs_and_earlier_runs_are_counted(root: Path):
    text = statement(root, told("client-0", "client-1", "client-2"))
    assert "- client-2 refused round 2: budget-exhausted: no more" in text
    assert "an old matter" not in text
    assert "up to 1 in these ledgers" in text
    assert "none in these ledgers" in statement(root, told("client-1"))


def test_under_client_level_dp_everybody_is_charged_what_the_servers_ledger_says(root: Path):
    file = ledgers.File("server")
    file.plan(ledgers.event(1.0, 2.0, 1, "full"), unit="client")
    for number in (1, 2, 3):
        file.commit(file.charge(number))
    (root / "ledger" / "server.jsonl").write_bytes(file.bytes)
    (root / "run.toml").write_text(TEXT.format(unit="client"))
    text = statement(root, told("client-0", "client-9"))
    spent = up([Event("full", 1.0, 2.0, 3)], 1e-5)
    assert {client: row[:3] for client, row in rows(text).items()} == {
        "client-0": [spent, "1e-05", "3"],
        "client-9": [spent, "1e-05", "3"],
    }
    assert "each client's update as it is, to the server" in text, "no noise protects it"


def test_under_shared_noise_it_says_whose_noise_it_is_and_how_it_was_counted(tmp_path: Path):
    happens, spent = ledgers.event(0.1, 1.5, 1, DISCRETE), [Event(DISCRETE, 0.1, 1.5, 2)]
    shared = NoiseShare(3, 1).terms(1.5, 10_000)
    (tmp_path / "ledger").mkdir()
    for name in ("client-0", "client-1", "client-2"):
        file = ledgers.File(name)
        code = {"accountant": "dp-accounting RDP at integer orders,", "dp-accounting": "0.6.0"}
        file.plan(happens, shared=shared, code=code)
        for number in (1, 2):
            file.commit(file.charge(number))
        (tmp_path / "ledger" / f"{name}.jsonl").write_bytes(file.bytes)
    text = TEXT.format(unit="example").replace("steps = 10", "steps = 1\nsampling_rate = 0.1")
    text = text.replace('weights = "uniform"', 'name = "ffa"') + SHARED
    (tmp_path / "run.toml").write_text(text)
    (tmp_path / "environment.json").write_text(json.dumps({"run_id": ledgers.RUN}))
    said = statement(tmp_path, {f"client-{i}": {"delta": 1e-5} for i in range(3)})
    share = 1.5 * (1 + 100 / 2**20) / math.sqrt(2)
    assert f"discrete Gaussian of standard deviation {share:.6g}·C, sampled exactly" in said
    assert "2 honest clients of at least 3 come to σ·(C + √10000·C/2^20)" in said
    assert f"it would be {rounded_up(optimistic(spent, 1e-5))}, which is no guarantee" in said
    assert f"| client-0 | {rounded_up(epsilon(spent, 1e-5))} | 1e-05 | 2 | 0.0000 |" in said
    assert "**Accountant**: dp-accounting RDP at integer orders, 0.6.0 (upper bound)" in said
    assert "with fewer than 3 in its sum nothing is released" in said
    assert "exact integers" in said
