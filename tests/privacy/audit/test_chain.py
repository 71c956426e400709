"""One ledger file: intact passes; whatever is done to a line, that line is named, and its neighbours are not."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.privacy.audit.chain import read_chain
from fedlab.privacy.audit.lines import Finding
from fedlab.privacy.audit.rules import Ledger, read_ledger
from fedlab.privacy.audit.schema import CLIENT

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("ledgers", HERE.parent / "ledgers.py")
ledgers: Any = importlib.util.module_from_spec(spec)
sys.modules["ledgers"] = ledgers
spec.loader.exec_module(ledgers)

SMALL = ledgers.client_file(1)
LARGE = ledgers.client_file(4)


def read(data: bytes | Any, owner: str = "client-0") -> Ledger:
    data = data if isinstance(data, bytes) else data.bytes
    return read_ledger(read_chain(data, owner, owner, CLIENT, "PLAN"))


def named(data: bytes | Any) -> list[tuple[int | None, str]]:
    return [(finding.line, finding.message) for finding in read(data).findings]


def only(data: bytes | Any, line: int | None, message: str) -> None:
    found = named(data)
    assert [number for number, _ in found] == [line], found
    assert message in found[0][1]


def lines(file: Any) -> list[bytes]:
    return file.bytes.splitlines(keepends=True)


def test_an_intact_file_passes_and_is_counted():
    ledger = read(LARGE)
    assert ledger.findings == ()
    assert (len(ledger.counted), len(ledger.commits), len(ledger.releases), ledger.chain.size) == (4, 4, 4, 13)
    assert ledger.events()[0].steps == 5
    assert str(Finding("client-3", 17, "is torn")) == "client-3: line 17: is torn"


def test_the_audit_imports_nothing_from_the_side_that_writes():
    allowed = {"fedlab.errors", "fedlab.privacy.accounting"}
    empirical = {"bounds.py", "laws.py"}  # they audit the trainer and read no ledger
    for path in (HERE.parents[3] / "fedlab" / "privacy" / "audit").glob("*.py"):
        if path.name in empirical:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Import) and any(alias.name.startswith("fedlab") for alias in node.names))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedlab"):
                assert node.module in allowed or node.module.startswith("fedlab.privacy.audit")
                if node.module == "fedlab.privacy.accounting":
                    assert [alias.name for alias in node.names] == ["Event"]


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_every_flipped_byte_is_found_on_its_line_and_nowhere_else(flip: int):
    data, line = SMALL.bytes, 1
    for position, byte in enumerate(data):
        found = named(data[:position] + bytes([byte ^ flip]) + data[position + 1 :])
        allowed = {line, line + 1} if byte == 0x0A or byte ^ flip == 0x0A else {line}
        assert found, f"byte {position} of line {line}"
        assert {number for number, _ in found} <= allowed, (position, found)
        assert line in {number for number, _ in found}
        line += byte == 0x0A


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_other_value_anywhere_is_found(data):
    raw = LARGE.bytes
    position = data.draw(st.integers(0, len(raw) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != raw[position]))
    found = named(raw[:position] + bytes([value]) + raw[position + 1 :])
    assert raw[:position].count(b"\n") + 1 in {number for number, _ in found}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_raise(junk: bytes, after: bool):
    assert read(SMALL.bytes + junk if after else junk).findings or not junk


@pytest.mark.parametrize(
    "junk", [b"[" * 100_000, b'{"seq":' + b"9" * 5000 + b"}", b'{"a":1e999}', b'{"a":NaN}', b"{}", b'"\\ud800"']
)
def test_hostile_json_does_not_raise(junk: bytes):
    only(SMALL.bytes + junk + b"\n", 5, "")


@pytest.mark.parametrize("at", range(1, 13))
def test_one_deleted_line(at: int):
    raw = lines(LARGE)
    if at == 12:  # the end: a chain alone cannot show it
        assert named(b"".join(raw[:at])) == []
    else:
        only(b"".join(raw[:at] + raw[at + 1 :]), at + 1, f"1 missing line before it (seq {at})")


def test_other_moved_lines():
    raw = lines(LARGE)
    only(b"".join(raw[1:]), 1, "missing")
    only(b"".join([*raw[:5], raw[4], *raw[5:]]), 6, "is a duplicate of line 5")
    neighbours = named(b"".join([*raw[:4], raw[5], raw[4], *raw[6:]]))
    assert len(neighbours) == 1
    assert neighbours[0][0] in (5, 6)
    assert "was moved" in neighbours[0][1]
    swapped = named(b"".join([*raw[:3], raw[8], *raw[4:8], raw[3], *raw[9:]]))
    assert [number for number, _ in swapped] == [4, 9]
    assert all("was moved" in text for _, text in swapped)
    assert "which is the place of line 9" in swapped[0][1]
    only(b"".join(raw[:3] + raw[7:]), 4, "4 missing lines before it (between seq 2 and seq 7)")


def test_two_damages_are_both_named_and_nothing_else():
    raw = lines(LARGE)
    raw[2] = raw[2].replace(b'"steps":5', b'"steps":4')
    raw[7] = raw[7].replace(b'"round":3', b'"round":9')
    assert [(n, text.split(":")[0]) for n, text in named(b"".join(raw))] == [(3, "was edited"), (8, "was edited")]
    only(b"".join(raw[:3]), 3, "was edited")
    raw = lines(LARGE)
    raw[0] = raw[0].replace(b'"participations":10', b'"participations":99')
    only(b"".join(raw), 1, "was edited")


def test_torn_empty_and_spaced():
    only(LARGE.bytes[:-1], 13, "is torn")
    only(LARGE.bytes[:-40], 13, "is torn")
    only(b"", None, "empty")
    raw = lines(LARGE)
    only(b"".join([*raw[:3], raw[3].replace(b'":', b'": ', 1), *raw[4:]]), 4, "canonical")
    only(LARGE.bytes.replace(b"\n", b"\r\n", 1), 1, "canonical")


def replaced(at: int, key: str, name: str = "client-0", **fields: Any) -> bytes:
    """LARGE with one line changed and sealed again by somebody's key."""
    changed = [dict(line) for line in LARGE.lines]
    changed[at] = ledgers.seal({**changed[at], **fields}, key)
    return "".join(ledgers.dump(line) + "\n" for line in changed).encode()


def test_signatures():
    only(replaced(4, "mallory"), 5, "bad signature")
    forged = {**LARGE.lines[4], "round": 7}
    forged = {**ledgers.seal(forged, "client-0"), "sig": LARGE.lines[4]["sig"]}
    only(
        "".join(ledgers.dump(line) + "\n" for line in [*LARGE.lines[:4], forged, *LARGE.lines[5:]]).encode(),
        5,
        "bad signature",
    )
    raw, other = lines(LARGE), lines(ledgers.client_file(4, "client-1"))
    only(b"".join([*raw[:6], other[5], *raw[6:]]), 7, "foreign: it belongs to 'client-1'")
    only(b"".join([*raw[:6], other[6], *raw[7:]]), 7, "foreign")
    stranger = ledgers.File("client-0", key="mallory")
    stranger.plan()
    only(b"".join([*raw, *lines(stranger)]), 14, "foreign: it is signed with another key")
    only(b"".join(other), None, "swapped")
    assert read(stranger).chain.key == ledgers.public("mallory"), (
        "signed anew throughout: only receipts.jsonl or --keys can tell"
    )


def signed_by_owner(kind: str = "CHARGE", **fields: Any) -> Any:
    """A file whose owner himself signed something wrong."""
    file = ledgers.File("client-0")
    file.plan(**(fields if kind == "PLAN" else {}))
    if kind == "CHARGE":
        file.charge(1, **fields)
    elif kind != "PLAN":
        file.add(kind, **fields)
    return file


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        (signed_by_owner("BUDGET"), 2, "unknown type 'BUDGET'"),
        (signed_by_owner("CHARGE", event=ledgers.event(sampler="weighted")), 2, "unknown sampler 'weighted'"),
        (signed_by_owner("CHARGE", event={**ledgers.event(), "q": "nan"}), 2, "event: q: must be a finite real"),
        (signed_by_owner("CHARGE", event={**ledgers.event(), "sigma": "inf"}), 2,
        "event: sigma: must be a finite real"),
        (signed_by_owner("CHARGE", event={**ledgers.event(), "sigma": "0x1p+0"}), 2, "sigma: must be a finite real"),
        (signed_by_owner("CHARGE", event={**ledgers.event(), "sigma": "0x1.0000000000000p+99999"}), 2,
        "sigma: must be a finite real"),
        (signed_by_owner("CHARGE", event=ledgers.event(sigma=-1.0)), 2, "sigma: must be >= 0, got -1"),
        (signed_by_owner("CHARGE", event=ledgers.event(sigma=-0.0)), 2, "sigma: must be >= 0"),
        (signed_by_owner("CHARGE", event=ledgers.event(q=1.5)), 2, "q: must be >= 0 and <= 1, got 1.5"),
        (signed_by_owner("CHARGE", event=ledgers.event(steps=-1)), 2, "steps: must be an integer from 0"),
        (signed_by_owner("CHARGE", event=ledgers.event(steps=10**30)), 2, "steps: must be an integer from 0 to 2^53"),
        (signed_by_owner("CHARGE", event=ledgers.event(steps=True)), 2, "steps: must be an integer"),
        (signed_by_owner("CHARGE", round=0), 2, "round: must be an integer from 1"),
        (signed_by_owner("CHARGE", refund=1), 2, "CHARGE has the unknown key 'refund'"),
        (signed_by_owner("CHARGE", v=2), 2, "v: must be 1"),
        (signed_by_owner("CHARGE", time="yesterday"), 2, "time: must be a UTC time"),
        (signed_by_owner("CHARGE", dataset="d2" * 32), 2, "another dataset"),
        (signed_by_owner("CHARGE", event=ledgers.event(sigma=2.0)), 2,
        "CHARGE has another event than its plan (line 1)"),
        (signed_by_owner("CHARGE", filter="pld"), 2, "its plan has no budget"),
        (signed_by_owner("CHARGE", plan="ee" * 32), 2, "names as its plan no PLAN"),
        (signed_by_owner("CHARGE", run="cd" * 16), 2, "of another run than its plan"),
        (signed_by_owner("PLAN", relation="replace_one"), 1, "relation: must be one of add_remove"),
        (signed_by_owner("PLAN", key="ee" * 32), 1, ""),
        (signed_by_owner("PLAN", budget={"epsilon": "-0x1.0000000000000p+0", "delta": "0x0.0p+0"}), 1,
        "budget: epsilon: must be >= 0"),
        (signed_by_owner("COMMIT", charge="ee" * 32, steps=1, out="ee" * 32), 2, "names as its charge no CHARGE"),
    ],
)  # fmt: skip
def test_what_the_owner_signed_must_still_be_right(file, line: int, message: str):
    only(file, line, message)


def test_a_line_that_cannot_be_read_is_never_skipped():
    assert not read(signed_by_owner("BUDGET")).bounded
    assert not read(signed_by_owner("CHARGE", event=ledgers.event(sampler="weighted"))).bounded


def test_the_order_within_a_participation():
    file = ledgers.File("client-0")
    file.add("RECOVER", bytes=3, lost="ee" * 32)
    only(file, 1, "no key is known for this file: its first line must be a PLAN")
    file = ledgers.client_file(1)
    file.plan()
    only(file, 5, "a second PLAN for one run; the first is line 1")
    file = ledgers.File("client-0")
    file.plan()
    first, second = file.charge(1), file.charge(2)
    file.commit(first)
    only(file, 4, "names the CHARGE in line 2, which line 3 (CHARGE) has ended")
    file.add("ABORT", charge=second["hash"], reason="r")
    file.commit(second)
    assert [number for number, _ in named(file)] == [4, 6]
    file = ledgers.File("client-0")
    file.plan()
    file.commit(file.charge(1), steps=4)
    only(file, 3, "COMMIT executed 4 steps, 5 were charged")
    file = ledgers.client_file(1)
    file.release(file.lines[2], file.lines[3]["receipt"])
    only(file, 5, "which line 4 has released already")


def test_receipts_inside_releases():
    for change, text in (
        ({"round": 9}, "its round is not that of the COMMIT"),
        ({"client": "client-1"}, "its client is not"),
        ({"head": "ee" * 32}, "its head is not"),
        ({"out": "ee" * 32}, "its out is not"),
    ):
        file = ledgers.File("client-0")
        file.plan()
        commit = file.commit(file.charge(1))
        receipt = ledgers.Server(["client-0"]).receipt("client-0", 1, commit, **change)
        file.release(commit, receipt)
        only(file, 4, text)
        file.lines.pop()
        file.release(commit, {**receipt, "time": "2026-01-01T00:00:00Z"})
        assert "a receipt that was edited" in named(file)[0][1]
        file.lines.pop()
        file.release(commit, {**receipt, "sig": "00" * 64})
        assert "a receipt with a bad signature" in named(file)[0][1]


def test_charges_without_commit_count_and_the_cap_holds():
    file = ledgers.File("client-0")
    file.plan(participations=2)
    for r in range(1, 4):
        file.charge(r)
    assert len(read(file).counted) == 3
    only(file, 4, "exceeds the 2 participations")


def test_seeded_repeats_count_once_and_must_be_the_same_bits():
    file = ledgers.File("client-0")
    file.plan(noise="seeded", participations=1)
    file.charge(1)
    file.commit(file.charge(1), out="aa" * 32)
    file.commit(file.charge(1), out="aa" * 32)
    assert (named(file), len(read(file).counted)) == ([], 1)
    file.commit(file.charge(1), out="bb" * 32)
    only(file, 8, "differs in its `out`")
    assert len(read(file).counted) == 2
    file = ledgers.File("client-0")
    file.plan(noise="seeded")
    file.charge(1)
    file.charge(1, state="ab" * 32)
    assert len(read(file).counted) == 2
    file = ledgers.File("client-0")
    file.plan()
    file.charge(1)
    file.charge(1)
    assert len(read(file).counted) == 2, "fresh noise is a new release"


def test_a_second_run_on_the_same_data_adds_up():
    file = ledgers.client_file(2)
    file.run = "cd" * 16
    file.plan(ledgers.event(sigma=2.0))
    file.commit(file.charge(1))
    ledger = read(file)
    assert (ledger.findings, len(ledger.counted), len(ledger.plans)) == ((), 3, 2)
    assert ledger.events()[-1].sigma == 2.0
