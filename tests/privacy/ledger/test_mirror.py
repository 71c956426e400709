"""What the server keeps, checks and seals."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from fedlab.errors import PrivacyError
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.guard import Guard
from fedlab.privacy.ledger.keys import load_or_create_key
from fedlab.privacy.ledger.ledger import Ledger, authentic, lines_after, parse_lines
from fedlab.privacy.ledger.mirror import LedgerMirror
from fedlab.privacy.ledger.terms import plan_terms

EVENT = Event("poisson", 0.05, 0.9, 4)
TERMS = plan_terms(
    EVENT, unit="example", clip=1.0, normaliser=32.0, delta=1e-5, n=640, participations=9, noise="secure"
) | {
    "scope": "0" * 64,
    "budget": None,
    "content": None,
    "configuration": "c" * 64,
    "releases": ["size"],
}
STATE, OUT = "5" * 64, "6" * 64


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    folder = tmp_path / "client"
    folder.mkdir()
    made = Guard(Ledger(folder / "c.jsonl", "c", "d" * 64, load_or_create_key(folder / "c.pem")), "r1")
    made.plan(TERMS, {})
    return made


def mirror(tmp_path: Path, guard: Guard, name: str = "run") -> LedgerMirror:
    made = LedgerMirror(tmp_path / name, "r1", tmp_path / "client")
    made.enrol("c", guard.ledger.public, guard.ledger.path.read_text())
    made.start("example", "0" * 64)
    return made


def train(guard: Guard, number: int, out: str = OUT) -> None:
    with guard.charge(TERMS, number, STATE) as commit:
        commit(4, out)


def test_an_update_is_witnessed_only_as_it_was_charged_and_committed(tmp_path: Path, guard: Guard):
    kept = mirror(tmp_path, guard)
    with pytest.raises(PrivacyError, match="shows no charge for round 1"):
        kept.witness("c", 1, EVENT, STATE, OUT)
    train(guard, 1)
    kept.accept("c", lines_after(guard.ledger.entries, kept.known("c")))
    assert kept.witness("c", 1, EVENT, STATE, OUT)["type"] == "COMMIT"
    for arguments, reason in (
        ((2, EVENT, STATE, OUT), "no charge for round 2"),
        ((1, Event("poisson", 0.05, 1.0, 4), STATE, OUT), "not what it declared"),
        ((1, EVENT, "7" * 64, OUT), "another state"),
        ((1, EVENT, STATE, "7" * 64), "does not commit the update"),
    ):
        with pytest.raises(PrivacyError, match=reason):
            kept.witness("c", *arguments)


@pytest.mark.parametrize("first", ["aborted", "committed"])
def test_of_a_round_that_was_charged_twice_the_last_update_is_the_one_that_came(
    first: str, tmp_path: Path, guard: Guard
):
    """A round that was cut off is charged anew where noise is new; what came before it is not what came now."""
    kept = mirror(tmp_path, guard)
    if first == "aborted":
        with suppress(OSError), guard.charge(TERMS, 1, STATE):
            raise OSError
    else:
        train(guard, 1, "7" * 64)
    train(guard, 1)
    kept.accept("c", lines_after(guard.ledger.entries, kept.known("c")))
    assert kept.witness("c", 1, EVENT, STATE, OUT) == guard.ledger.entries[-1]
    with pytest.raises(PrivacyError, match="does not commit the update"):
        kept.witness("c", 1, EVENT, STATE, "7" * 64)


def test_lines_that_do_not_continue_the_known_ones_are_refused(tmp_path: Path, guard: Guard):
    kept = mirror(tmp_path, guard)
    train(guard, 1)
    with pytest.raises(PrivacyError, match="does not follow"):
        kept.accept("c", lines_after(guard.ledger.entries, 2))
    with pytest.raises(PrivacyError, match="line 1: not a JSON object"):
        kept.accept("c", "[1]\n")
    kept.accept("c", lines_after(guard.ledger.entries, 1))
    with pytest.raises(PrivacyError, match="does not follow"):
        kept.accept("c", lines_after(guard.ledger.entries, 1))
    assert kept.known("c") == 3


def close(kept: LedgerMirror, number: int = 1) -> dict[str, dict]:
    commits = {"c": kept.witness("c", number, EVENT, STATE, OUT)}
    return kept.close_round(number, (STATE, STATE, "8" * 64), {"c": OUT}, commits)


def test_a_receipt_comes_after_its_round_and_fixes_it(tmp_path: Path, guard: Guard):
    kept = mirror(tmp_path, guard)
    train(guard, 1)
    kept.accept("c", lines_after(guard.ledger.entries, 1))
    receipt = close(kept)["c"]
    *_, round_line, last = parse_lines((tmp_path / "run" / "receipts.jsonl").read_text())
    assert (round_line["type"], round_line["clients"], last) == ("ROUND", {"c": OUT}, receipt)
    assert receipt["prev"] == round_line["hash"]


def test_what_a_client_did_not_come_to_send_is_caught_up_with(tmp_path: Path, guard: Guard):
    kept = mirror(tmp_path, guard)
    train(guard, 1)
    assert kept.known("c") == 1
    with guard.ledger.path.open("ab") as file:
        file.write(b'{"torn')
    kept.catch_up("c")
    assert kept.known("c") == 3
    assert (tmp_path / "run" / "ledger" / "c.jsonl").read_bytes().count(b"\n") == 3


def test_a_server_that_starts_again_remembers_what_it_receipted(tmp_path: Path, guard: Guard):
    kept = mirror(tmp_path, guard)
    older = guard.ledger.path.read_text()
    train(guard, 1)
    kept.accept("c", lines_after(guard.ledger.entries, 1))
    receipt = close(kept)["c"]
    assert authentic(receipt, receipt["key"])
    guard.release(receipt)
    again = LedgerMirror(tmp_path / "run", "r1", tmp_path / "client")
    with pytest.raises(PrivacyError, match="its end was cut off, or an older copy was put back"):
        again.enrol("c", guard.ledger.public, older)
    again.enrol("c", guard.ledger.public, guard.ledger.path.read_text())


@pytest.mark.parametrize("memory", ["receipts.jsonl", "heads.json"])
def test_a_rewritten_ledger_of_equal_length_is_refused(memory: str, tmp_path: Path, guard: Guard):
    """Their owner's key makes any lines: what the server remembers is a line's hash, not only its number."""
    kept = mirror(tmp_path, guard)
    train(guard, 1)
    kept.accept("c", lines_after(guard.ledger.entries, 1))
    close(kept)
    other = Guard(Ledger(tmp_path / "other.jsonl", "c", "d" * 64, guard.ledger.key), "r1")
    other.plan(TERMS, {})
    train(other, 1, "7" * 64)
    assert len(other.ledger.entries) == len(guard.ledger.entries)
    if memory == "receipts.jsonl":
        (tmp_path / "client" / "heads.json").unlink()
    again = LedgerMirror(tmp_path / ("run" if memory == "receipts.jsonl" else "later"), "r1", tmp_path / "client")
    with pytest.raises(PrivacyError, match="differs there"):
        again.enrol("c", guard.ledger.public, other.ledger.path.read_text())
    again.enrol("c", guard.ledger.public, guard.ledger.path.read_text())


def test_another_run_that_shares_the_ledgers_remembers_too(tmp_path: Path, guard: Guard):
    kept = mirror(tmp_path, guard)
    older = guard.ledger.path.read_text()
    train(guard, 1)
    kept.accept("c", lines_after(guard.ledger.entries, 1))
    close(kept)
    later = LedgerMirror(tmp_path / "later", "r2", tmp_path / "client")
    with pytest.raises(PrivacyError, match="an older copy was put back"):
        later.enrol("c", guard.ledger.public, older)


def test_of_a_ledger_that_grew_the_newest_line_is_remembered(tmp_path: Path, guard: Guard):
    kept, older = mirror(tmp_path, guard), ""
    for number in (1, 2):
        older = guard.ledger.path.read_text()
        train(guard, number)
        kept.accept("c", lines_after(guard.ledger.entries, kept.known("c")))
        close(kept, number)
    assert '"COMMIT"' in older, "the first round's lines are all there"
    later = LedgerMirror(tmp_path / "later", "r2", tmp_path / "client")
    with pytest.raises(PrivacyError, match="an older copy was put back"):
        later.enrol("c", guard.ledger.public, older)


def test_the_copy_in_the_run_directory_is_the_ledger_to_the_byte(tmp_path: Path, guard: Guard):
    kept = mirror(tmp_path, guard)
    train(guard, 1)
    kept.accept("c", lines_after(guard.ledger.entries, 1))
    assert (tmp_path / "run" / "ledger" / "c.jsonl").read_bytes() == guard.ledger.path.read_bytes()


def test_the_seal_names_every_head_and_file(tmp_path: Path, guard: Guard):
    kept = mirror(tmp_path, guard)
    kept.final({"adapter/x": (5, "9" * 64)}, STATE, "completed", {})
    final = parse_lines((tmp_path / "run" / "receipts.jsonl").read_text())[-1]
    assert final["heads"] == {"c": [0, guard.ledger.entries[-1]["hash"]]}
    assert (final["files"], final["state"], final["status"]) == ({"adapter/x": [5, "9" * 64]}, STATE, "completed")
    assert authentic(final, parse_lines((tmp_path / "run" / "receipts.jsonl").read_text())[0]["key"])
