"""What the owner agrees to, what it refuses, and that a refusal costs nothing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedlab.errors import PrivacyError
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.calibration import calibrate_sigma
from fedlab.privacy.ledger.guard import Guard, Refusal, affordable
from fedlab.privacy.ledger.keys import load_or_create_key
from fedlab.privacy.ledger.ledger import Ledger, charged, events, parse_lines, seal
from fedlab.privacy.ledger.terms import budget_terms, plan_terms, run_terms, scope_of

EVENT = Event("poisson", 0.05, 0.9, 4)
DELTA = 1e-5


def terms(
    budget: float | None = None, event: Event = EVENT, participations: int = 50, noise: str = "secure", **more: Any
) -> dict[str, Any]:
    base = plan_terms(
        event, unit="example", clip=1.0, normaliser=32.0, delta=DELTA, n=640, participations=participations, noise=noise
    )
    limit = budget_terms(budget, DELTA) if budget is not None else None
    return {
        **base,
        "scope": scope_of({"a.lora_B": (4, 2)}),
        "budget": limit,
        "content": None,
        **run_terms("c" * 64, ["size"]),
        **more,
    }


def guard(folder: Path, run: str = "r1") -> Guard:
    return Guard(Ledger(folder / "c.jsonl", "c", "d" * 64, load_or_create_key(folder / "c.pem")), run)


def spend(guarded: Guard, agreed: dict[str, Any], number: int) -> None:
    with guarded.charge(agreed, number, f"{number:064d}") as commit:
        commit(agreed["event"]["steps"], "f" * 64)


def kinds(guarded: Guard) -> list[str]:
    return [e["type"] for e in guarded.ledger.entries]


def test_other_shares_of_noise_than_were_signed_are_refused(tmp_path: Path):
    """A ledger from before there were any has no such key, and shares none."""
    shared = {"survivors": 4, "colluding": 1, "dimension": 8, "bits": 20, "share": (1e6).hex()}
    agreed, guarded = terms(shared=shared), guard(tmp_path)
    assert guarded.plan(agreed, {}) is None
    for other in (None, {**shared, "survivors": 3}, {**shared, "share": (1e5).hex()}):
        with pytest.raises(Refusal, match="plan-mismatch: shared = "):
            spend(guarded, terms(shared=other), 1)
    spend(guarded, agreed, 1)
    assert guarded.ledger.entries[0]["shared"] == shared


def test_the_round_that_would_cross_the_budget_is_refused_and_not_a_round_earlier(tmp_path: Path):
    limit, agreed, guarded = 3.0, terms(3.0), guard(tmp_path)
    assert guarded.plan(agreed, {}) is None
    affordable_rounds = next(
        k for k in range(1, 99) if epsilon([Event("poisson", 0.05, 0.9, 4 * (k + 1))], DELTA) > limit
    )
    for number in range(1, affordable_rounds + 1):
        spend(guarded, agreed, number)
    trained = False
    with (
        pytest.raises(Refusal, match="budget-exhausted: ε = 2") as refused,
        guarded.charge(agreed, affordable_rounds + 1, "0" * 64),
    ):
        trained = True
    assert not trained
    assert refused.value.kind == "budget-exhausted"
    assert kinds(guarded)[-1] == "REFUSE"
    assert epsilon(events(guarded.ledger.entries), DELTA) <= limit
    assert guarded.exhausted(agreed, affordable_rounds + 1)
    assert kinds(guarded).count("REFUSE") == 1, "asking again does not fill the disk"


def test_a_power_cut_takes_no_line_that_something_was_done_under(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that keeps what was synced and nothing else: the charge is on it before anything is trained, the commit
    before anything leaves, a refusal and an aborted round when the owner has answered.
    """
    disk, real, file = b"", os.fsync, tmp_path / "c.jsonl"

    def fsync(descriptor: int) -> None:
        nonlocal disk
        real(descriptor)
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            disk = file.read_bytes()

    def on_disk() -> list[str]:
        return [entry["type"] for entry in parse_lines(disk.decode())]

    monkeypatch.setattr(os, "fsync", fsync)
    guarded, agreed = guard(tmp_path), terms(participations=2)
    guarded.plan(agreed, {})
    assert on_disk() == ["PLAN"]
    with guarded.charge(agreed, 1, "0" * 64) as commit:
        assert on_disk() == ["PLAN", "CHARGE"]
        commit(4, "f" * 64)
        assert on_disk() == ["PLAN", "CHARGE", "COMMIT"]
    with suppress(OSError), guarded.charge(agreed, 2, "1" * 64):
        raise OSError
    assert on_disk()[-1] == "ABORT"
    with pytest.raises(Refusal), guarded.charge(agreed, 3, "2" * 64):
        pytest.fail("trained")
    assert on_disk()[-1] == "REFUSE"


def test_a_budget_that_covers_the_calibrated_run_exactly_is_no_obstacle(tmp_path: Path):
    sigma = calibrate_sigma(0.05, 6 * 4, 2.0, DELTA)
    agreed, guarded = terms(2.0, Event("poisson", 0.05, sigma, 4)), guard(tmp_path)
    guarded.plan(agreed, {})
    for number in range(1, 7):
        spend(guarded, agreed, number)
    assert guarded.exhausted(agreed, 7)


@pytest.mark.parametrize(("delta", "affordable_here"), [(DELTA, True), (DELTA / 1e4, False)])
def test_a_budget_is_counted_at_its_own_delta(delta: float, affordable_here: bool, tmp_path: Path):
    """The plan's δ is the server's to choose; the budget's is the owner's."""
    limit = 1.05 * epsilon([EVENT], DELTA)
    agreed = terms() | {"budget": budget_terms(limit, delta)}
    refusal = guard(tmp_path).plan(agreed, {})
    assert (refusal is None) == affordable_here


def test_a_second_run_starts_from_what_is_spent_and_other_parameters_go_through_the_rdp_filter(tmp_path: Path):
    first = guard(tmp_path, "r1")
    first.plan(terms(3.0), {})
    for number in (1, 2, 3):
        spend(first, terms(3.0), number)
    other = terms(3.0, Event("poisson", 0.05, 1.1, 4))
    second = guard(tmp_path, "r2")
    second.plan(other, {})
    rounds = 0
    while not second.exhausted(other, rounds + 1):
        rounds += 1
        spend(second, other, rounds)
    work = events(second.ledger.entries)
    assert epsilon(work, DELTA, "rdp") <= 3.0, "parameters chosen after looking at outputs need a filter"
    assert epsilon([*work, Event("poisson", 0.05, 1.1, 4)], DELTA, "rdp") > 3.0
    assert {e["filter"] for e in charged(second.ledger.entries, "r2")} == {"rdp"}
    assert rounds > 0
    third = guard(tmp_path, "r3")
    assert third.plan(other, {}).kind == "budget-exhausted", "not even one round"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"event": Event("poisson", 0.05, 0.45, 4)}, "sigma: 0.45"),
        ({"event": Event("poisson", 0.05, 0.9, 8)}, "steps: 8"),
        ({"clip": (2.0).hex()}, "clip = 2 was asked, 1 was signed"),
        ({"scope": scope_of({"a.lora_B": (4, 2), "head.weight": (3, 4)})}, "scope"),
        ({"normaliser": (16.0).hex()}, "normaliser"),
        ({"noise": "seeded"}, "noise = seeded"),
        ({"participations": 51}, "participations = 51"),
        ({"budget": 9.0}, "budget"),
    ],
)
def test_whoever_asks_for_other_terms_than_were_signed_is_refused(changed: dict[str, Any], named: str, tmp_path: Path):
    guarded = guard(tmp_path)
    guarded.plan(terms(3.0), {})
    asked = terms(**({"budget": 3.0} | changed))
    with pytest.raises(Refusal, match="plan-mismatch") as refused, guarded.charge(asked, 1, "0" * 64):
        pytest.fail("trained")
    assert named in str(refused.value)
    assert "CHARGE" not in kinds(guarded)
    with pytest.raises(Refusal, match="plan-mismatch"):
        guarded.plan(asked, {})
    spend(guarded, terms(3.0), 1)


def test_no_plan_no_charge_and_no_round_beyond_the_participations(tmp_path: Path):
    guarded = guard(tmp_path)
    with pytest.raises(Refusal, match="signed no plan"), guarded.charge(terms(), 1, "0" * 64):
        pytest.fail("trained")
    agreed = terms(participations=2)
    guarded.plan(agreed, {})
    spend(guarded, agreed, 1)
    spend(guarded, agreed, 2)
    with pytest.raises(Refusal, match="participations: 2 of 2"), guarded.charge(agreed, 3, "0" * 64):
        pytest.fail("trained")


def test_a_duplicated_message_costs_a_seeded_client_nothing_and_a_secure_one_a_round(tmp_path: Path):
    for noise, expected in (("seeded", 1), ("secure", 2)):
        folder = tmp_path / noise
        folder.mkdir()
        guarded, agreed = guard(folder), terms(noise=noise, participations=2)
        guarded.plan(agreed, {})
        spend(guarded, agreed, 1)
        spend(guarded, agreed, 1)
        assert len(charged(guarded.ledger.entries)) == expected


def test_training_that_breaks_is_aborted_and_charged_in_full(tmp_path: Path):
    guarded, agreed = guard(tmp_path), terms()
    guarded.plan(agreed, {})
    with pytest.raises(ZeroDivisionError), guarded.charge(agreed, 1, "0" * 64):
        raise ZeroDivisionError("half-way")
    assert kinds(guarded) == ["PLAN", "CHARGE", "ABORT"]
    assert events(guarded.ledger.entries) == [EVENT]


def test_another_number_of_steps_than_charged_is_never_committed(tmp_path: Path):
    guarded, agreed = guard(tmp_path), terms()
    guarded.plan(agreed, {})
    with (
        pytest.raises(PrivacyError, match="5 steps were executed, 4 were charged"),
        guarded.charge(agreed, 1, "0" * 64) as commit,
    ):
        commit(5, "f" * 64)
    assert kinds(guarded) == ["PLAN", "CHARGE", "ABORT"]


def test_the_filter_of_one_mechanism_is_pld_of_several_is_rdp():
    one = [Event("poisson", 0.05, 0.9, 40)]
    tight, loose = epsilon(one, DELTA, "pld"), epsilon(one, DELTA, "rdp")
    between = (tight + loose) / 2
    assert affordable(one, between, DELTA)[0] == "pld"
    assert affordable(one, loose * 1.001, DELTA)[0] == "rdp"
    assert affordable([*one, Event("poisson", 0.05, 50.0, 1)], between, DELTA)[0] is None
    assert affordable([], 1.0, DELTA) == ("rdp", 0.0)
    assert affordable([Event("poisson", 0.05, 0.0, 1)], 1e9, DELTA)[0] is None


def test_a_receipt_must_be_signed_and_name_a_commit(tmp_path: Path):
    from fedlab.privacy.ledger.mirror import LedgerMirror

    guarded, agreed = guard(tmp_path), terms()
    guarded.plan(agreed, {})
    spend(guarded, agreed, 1)
    mirror = LedgerMirror(tmp_path / "run", "r1", tmp_path / "run" / "ledger")
    mirror.enrol("c", guarded.ledger.public, guarded.ledger.path.read_text())
    commit = guarded.ledger.entries[-1]
    receipt = mirror.close_round(1, ("0" * 64, "0" * 64, "1" * 64), {"c": commit["out"]}, {"c": commit})["c"]
    for key, value in (
        ("head", "0" * 64),
        ("number", 0),
        ("client", "d"),
        ("out", "0" * 64),
        ("round", 2),
        ("sig", "00"),
    ):
        with pytest.raises(PrivacyError, match="receipt"):
            guarded.release({**receipt, key: value})
    body = {key: value for key, value in receipt.items() if key not in ("hash", "sig")}
    for key, value in (("head", "0" * 64), ("number", 0), ("client", "d"), ("out", "0" * 64)):
        with pytest.raises(PrivacyError, match="names line"):  # and well signed
            guarded.release(seal({**body, key: value}, mirror.key))
    guarded.release(receipt)
    guarded.release(receipt)
    assert kinds(guarded) == ["PLAN", "CHARGE", "COMMIT", "RELEASE"]


def test_a_seeded_repeat_that_comes_to_other_bits_releases_nothing(tmp_path: Path):
    agreed, guarded = terms(noise="seeded"), guard(tmp_path)
    guarded.plan(agreed, {})
    for _ in range(2):
        spend(guarded, agreed, 1)
    with pytest.raises(PrivacyError, match="other bits"), guarded.charge(agreed, 1, f"{1:064d}") as commit:
        commit(4, "e" * 64)
    assert kinds(guarded) == ["PLAN", "CHARGE", "COMMIT", "CHARGE", "COMMIT", "CHARGE", "ABORT"]
    assert guarded.ledger.entries[-1]["reason"] == "repeated"
    assert len(charged(guarded.ledger.entries)) == 1
    with guarded.charge(agreed, 1, "5" * 64) as commit:  # another state is another charge
        commit(4, "e" * 64)
    assert len(charged(guarded.ledger.entries)) == 2


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_a_round_is_answered_once_where_the_owner_says_so(noise: str, tmp_path: Path):
    agreed, guarded = terms(noise=noise), guard(tmp_path)
    guarded.one_answer = True
    guarded.plan(agreed, {})
    with pytest.raises(ValueError), guarded.charge(agreed, 1, "0" * 64):  # noqa: PT011
        raise ValueError
    spend(guarded, agreed, 1)  # nothing had left: a charge of its own
    with pytest.raises(Refusal, match="repeated"), guarded.charge(agreed, 1, f"{1:064d}"):
        pass
    assert kinds(guarded) == ["PLAN", "CHARGE", "ABORT", "CHARGE", "COMMIT", "REFUSE"]


def test_a_round_of_one_run_is_no_answer_in_another(tmp_path: Path):
    """Runs share a ledger, and all of them have a round 1."""
    first, second = guard(tmp_path, "r1"), guard(tmp_path, "r2")
    for guarded, out in ((first, "e" * 64), (second, "f" * 64)):
        guarded.one_answer = True
        guarded.plan(terms(), {})
        with guarded.ledger.locked():
            assert guarded.committed(1) is None
        with guarded.charge(terms(), 1, "0" * 64) as commit:
            commit(4, out)
    for guarded, out in ((first, "e" * 64), (second, "f" * 64)):
        with guarded.ledger.locked():
            found = guarded.committed(1)
            assert found is not None
            assert found["out"] == out
            assert guarded.committed(2) is None
            assert guarded.committed(1, "9" * 64) is None, "on another state"


def test_another_configuration_than_was_signed_is_not_agreed_to(tmp_path: Path):
    guarded = guard(tmp_path)
    guarded.agree("e" * 64, first=True)
    with pytest.raises(Refusal, match="signed no plan"):
        guarded.agree("c" * 64, first=False)
    guarded.plan(terms(), {})
    guarded.agree("c" * 64, first=False)
    for first in (True, False):
        with pytest.raises(Refusal, match="configuration eeeeeeeeeeee… was asked, cccccccccccc… was signed"):
            guarded.agree("e" * 64, first)
    assert kinds(guarded) == ["PLAN", "REFUSE"]


def test_refusals_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedlab.privacy.ledger.guard.MOST_REFUSALS", 3)
    guarded = guard(tmp_path)
    guarded.plan(terms(), {})
    for number in range(10):
        guarded.refused(number, "policy", "x" * 10_000)
    assert kinds(guarded) == ["PLAN", "REFUSE", "REFUSE", "REFUSE"]
    assert len(guarded.ledger.entries[-1]["reason"]) == 300
