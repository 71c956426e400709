"""Shares of noise in a run directory: true ones pass, and every claim that they do not come to is found and named."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlab.privacy.accounting import DISCRETE, Event, epsilon
from fedlab.privacy.audit.run import RunAudit, audit_run
from fedlab.privacy.ledger.terms import scope_of
from fedlab.privacy.noise_share import NoiseShare

spec = importlib.util.spec_from_file_location("ledgers", Path(__file__).parents[1] / "ledgers.py")
ledgers: Any = importlib.util.module_from_spec(spec)
sys.modules["ledgers"] = ledgers
spec.loader.exec_module(ledgers)

SIGMA, Q, NAMES = 1.0, 0.02, ("client-0", "client-1", "client-2")
SHAPES = {name: tuple(shape) for name, (shape, _) in ledgers.STATE.items()}
SCOPE, DIMENSION = scope_of(SHAPES), sum(math.prod(shape) for shape in SHAPES.values())
TRUE = NoiseShare(2, 0).terms(SIGMA, DIMENSION)
EVENT = ledgers.event(Q, SIGMA, 1, DISCRETE)
SPENT = epsilon([Event(DISCRETE, Q, SIGMA, 2)], 1e-5)


def written(path: Path, shared: Any = TRUE, event: Any = EVENT, **plan: Any) -> RunAudit:
    """A run of three clients, two of whom are in every sum."""
    events = dict.fromkeys(NAMES, event)
    ledgers.write_run(
        path / "run", epsilon=dict.fromkeys(NAMES[:2], SPENT), events=events, shared=shared, scope=SCOPE, **plan
    )
    return audit_run(path / "run")


def edited(path: Path, file: str, **change: Any) -> list[str]:
    """A run of which one client signed another PLAN; its own later lines go on from it."""
    events = dict.fromkeys(NAMES, EVENT)
    original = ledgers.File.plan

    def plan(self: Any, happens: Any = None, **more: Any) -> Any:
        own = change if self.owner == file else {}
        return original(self, own.get("event", happens), **{**more, **{k: v for k, v in own.items() if k != "event"}})

    ledgers.File.plan = plan
    try:
        ledgers.write_run(
            path / "run", epsilon=dict.fromkeys(NAMES[:2], SPENT), events=events, shared=TRUE, scope=SCOPE
        )
    finally:
        ledgers.File.plan = original
    return [str(finding) for finding in audit_run(path / "run").findings]


def test_true_shares_pass_and_the_optimistic_figure_is_told(tmp_path: Path):
    audit = written(tmp_path)
    assert audit.findings == ()
    assert audit.epsilon_pld == audit.epsilon_rdp == pytest.approx(SPENT, rel=2e-3)
    assert any("RDP at integer orders holds" in note for note in audit.notes)


def test_more_noise_than_is_claimed_passes(tmp_path: Path):
    assert written(tmp_path, {**TRUE, "share": (2 * float.fromhex(TRUE["share"])).hex()}).findings == ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"share": (float.fromhex(TRUE["share"]) * (1 - 1e-12)).hex()}, "do not come to"),
        ({"colluding": 1}, "do not come to"),  # the same share for fewer honest ones
        ({"dimension": DIMENSION - 1}, f"its scope has {DIMENSION}"),
        ({"bits": 21}, "do not come to"),
        ({"bits": 19}, "run.toml makes it 20"),
        ({"survivors": 1}, "no share is left|must be from 2 to 3"),
        ({"survivors": 3}, "used a sum of 2 clients"),
        ({"share": (2.0**60).hex()}, "could reach"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_claim_that_the_shares_do_not_come_to_is_found(tmp_path: Path, change: dict[str, Any], text: str):
    """Signed by all clients alike, with a run.toml that says the same where it says anything."""
    import re

    there = [str(finding) for finding in written(tmp_path, {**TRUE, **change}).findings]
    assert any(re.search(text, line) for line in there), there


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shared": NoiseShare(3, 0).terms(SIGMA, DIMENSION)}, "survivors = 3 where client-0 has 2"),
        ({"shared": {**TRUE, "share": (float.fromhex(TRUE["share"]) / 2).hex()}}, "do not come to"),
        ({"shared": NoiseShare(2, 0).terms(0.5, DIMENSION), "event": ledgers.event(Q, 0.5, 1, DISCRETE)}, "σ = 0.5"),
        ({"delta": (1e-6).hex()}, "δ = 1e-06 where client-0 has 1e-05"),
        ({"shared": None}, "shares no noise"),
        ({"shared": None, "event": ledgers.event(Q, SIGMA, 1)}, "shares no noise"),
        ({"event": ledgers.event(Q, SIGMA, 1)}, "the two belong together"),
        ({"event": ledgers.event(Q, SIGMA, 2, DISCRETE)}, "one step per round"),
        ({"clip": (0.5).hex()}, "C = 0.5 where client-0 has 1.0"),
        ({"scope": "5c" * 32}, None),
    ],
    ids=lambda value: str(value)[:50],
)
def test_one_client_that_signed_something_else_is_found(tmp_path: Path, change: dict[str, Any], text: str | None):
    """Each one's claim rests on the others' shares."""
    there = edited(tmp_path, "client-1", **change)
    assert text is None or any(line.startswith("client-1") and text in line for line in there), there


def test_a_configuration_without_shares_is_found(tmp_path: Path):
    """Shares in a run whose run.toml has each client alone."""
    original = ledgers.configuration
    ledgers.configuration = lambda unit, clients, rounds, events, plan: original(
        unit, clients, rounds, events, {k: v for k, v in plan.items() if k != "shared"}
    )
    try:
        there = [str(finding) for finding in written(tmp_path).findings]
    finally:
        ledgers.configuration = original
    assert any("shares noise, run.toml says otherwise" in line for line in there), there


@pytest.mark.parametrize(
    "shared",
    [
        {},
        [],
        {**TRUE, "more": 1},
        {**TRUE, "share": "0x0.0p+0"},
        {**TRUE, "share": 1},
        {**TRUE, "bits": 10**9},
        {**TRUE, "bits": -1},
        {**TRUE, "dimension": 0},
        {**TRUE, "survivors": True},
        {**TRUE, "colluding": -1},
        {**TRUE, "dimension": 2**53},
    ],
    ids=str,
)
def test_what_is_no_share_is_no_ledger_line(tmp_path: Path, shared: Any):
    assert any("PLAN" in str(finding) for finding in written_odd(tmp_path, shared))


def written_odd(path: Path, shared: Any) -> list[str]:
    return edited(path, "client-1", shared=shared)


@pytest.mark.parametrize(
    "old_and_new",
    [
        ("survivors = 2", "survivors = inf"),
        ("survivors = 2", "survivors = nan"),
        ("survivors = 2", "survivors = [2]"),
        ("survivors = 2", "survivors = 2.5"),
        ("survivors = 2", "survivors = true"),
        ("colluding = 0", "colluding = -inf"),
        ("colluding = 0", "colluding = -2"),
        ("fraction = 1.0", "fraction = inf"),
        ("fraction = 1.0", "fraction = nan"),
        ("fraction = 1.0", "fraction = -1.0"),
        ("[privacy]", "[[privacy]]"),
        ("[run]", "[[run]]"),
        ("[data]", "[[data]]"),
    ],
    ids=str,
)
def test_a_configuration_that_is_none_is_a_finding_and_no_exception(tmp_path: Path, old_and_new: tuple[str, str]):
    original, (old, new) = ledgers.configuration, old_and_new

    def changed(*arguments: Any) -> str:
        text = original(*arguments)
        assert old in text
        return str(text.replace(old, new))

    ledgers.configuration = changed
    try:
        audit = written(tmp_path)
    finally:
        ledgers.configuration = original
    assert any(str(finding).startswith("run.toml") for finding in audit.findings), audit.findings


def test_a_share_of_any_size_is_a_finding_and_no_exception(tmp_path: Path):
    there = [str(finding) for finding in written(tmp_path, {**TRUE, "share": (1e308).hex()}).findings]
    assert any("could reach" in line for line in there), there


def test_a_scope_that_is_not_the_checkpoint_s_hides_no_dimension(tmp_path: Path):
    events = dict.fromkeys(NAMES, EVENT)
    shared = NoiseShare(2, 0).terms(SIGMA, 1)
    spent = dict.fromkeys(NAMES[:2], SPENT)
    ledgers.write_run(tmp_path / "run", epsilon=spent, events=events, shared=shared, scope="5c" * 32)
    there = [str(finding) for finding in audit_run(tmp_path / "run").findings]
    assert any("scope" in line for line in there), there
