"""The file: what is in it, who may hold it, and what is found when it is not what it was."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.errors import PrivacyError
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.keys import keyed_hash, load_or_create_key, public_hex, verified
from fedlab.privacy.ledger.ledger import (
    Ledger,
    canonical,
    charged,
    check_chain,
    event_fields,
    event_of,
    events,
    lines_after,
    parse_lines,
)

RUN, DATASET = "a" * 32, "d" * 64
EVENT = Event("poisson", 0.1, 0.7, 5)


def make(folder: Path, owner: str = "client-0") -> Ledger:
    return Ledger(folder / f"{owner}.jsonl", owner, DATASET, load_or_create_key(folder / "keys" / f"{owner}.pem"))


def plan(ledger: Ledger, run: str = RUN, noise: str = "secure") -> dict:
    fields = {
        "unit": "example",
        "relation": "add_remove",
        "event": event_fields(EVENT),
        "clip": (1.0).hex(),
        "normaliser": (32.0).hex(),
    }
    more = {
        "delta": (1e-5).hex(),
        "n": 320,
        "participations": 9,
        "scope": "0" * 64,
        "budget": None,
        "noise": noise,
        "content": None,
        "configuration": "c" * 64,
        "releases": ["size"],
        "shared": None,
    }
    return ledger.append("PLAN", run, key=ledger.public, code={}, **fields, **more)


def charge(ledger: Ledger, number: int, run: str = RUN, state: str = "1" * 64) -> dict:
    of = next(e for e in ledger.entries if e["type"] == "PLAN" and e["run"] == run)
    return ledger.append(
        "CHARGE", run, **{"round": number, "plan": of["hash"], "event": of["event"], "in": state, "filter": "none"}
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """PLAN, CHARGE, COMMIT, CHARGE."""
    made = make(tmp_path)
    with made.locked():
        plan(made)
        made.append("COMMIT", RUN, charge=charge(made, 1)["hash"], steps=5, out="2" * 64)
        charge(made, 2)
    return made


def test_lines_are_canonical_chained_and_signed(ledger: Ledger):
    raw = ledger.path.read_bytes()
    lines = raw.decode().splitlines()
    assert raw.endswith(b"\n")
    entries = [json.loads(line) for line in lines]
    assert [canonical(e).decode() for e in entries] == lines
    assert [e["seq"] for e in entries] == [0, 1, 2, 3]
    assert [e["prev"] for e in entries] == ["0" * 64, *(e["hash"] for e in entries[:-1])]
    assert all(verified(ledger.public, e["sig"], b"fedlab-ledger-v1:" + e["hash"].encode()) for e in entries)
    assert "." not in "".join(line.replace("0x1.", "") for line in lines), "no decimal fractions"


@given(
    q=st.floats(0, 1, allow_nan=False),
    sigma=st.floats(0, 1e300, allow_nan=False, allow_infinity=False),
    steps=st.integers(0, 10**9),
)
def test_events_survive_exactly(q: float, sigma: float, steps: int):
    event = Event("poisson", q, sigma, steps)
    assert event_of(json.loads(json.dumps(event_fields(event)))) == event


@pytest.mark.parametrize(
    "broken", [{}, {"sampler": "roulette", "q": "0x1p-1", "sigma": "0x1p0", "steps": 1}, {"sampler": "poisson", "q": 3}]
)
def test_what_is_no_event_is_refused(broken: dict):
    with pytest.raises((PrivacyError, ValueError)):
        event_of(broken)


def test_a_second_object_reads_what_the_first_wrote_and_both_go_on(ledger: Ledger, tmp_path: Path):
    other = make(tmp_path)
    with other.locked():
        assert other.entries == ledger.entries
        charge(other, 3)
    with ledger.locked():
        assert [e["seq"] for e in ledger.entries] == [0, 1, 2, 3, 4]
        charge(ledger, 4)
    assert events(ledger.entries) == [EVENT] * 4


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found_when_the_file_is_opened(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("flip")
    made = make(folder)
    with made.locked():
        plan(made)
        charge(made, 1)
    raw = bytearray(made.path.read_bytes())
    position = data.draw(st.integers(0, len(raw) - 2))  # the very last newline makes a torn line, which is another test
    raw[position] ^= data.draw(st.integers(1, 255))
    made.path.write_bytes(raw)
    with pytest.raises(PrivacyError), make(folder).locked():
        pass


@pytest.mark.parametrize("damage", ["delete", "duplicate", "swap", "foreign", "other key"])
def test_moved_missing_and_foreign_lines_are_found(damage: str, ledger: Ledger, tmp_path: Path):
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    if damage == "delete":
        del lines[1]
    elif damage == "duplicate":
        lines.insert(2, lines[1])
    elif damage == "swap":
        lines[1], lines[2] = lines[2], lines[1]
    elif damage == "foreign":
        stranger = make(tmp_path, "client-1")
        with stranger.locked():
            plan(stranger)
        lines[0] = stranger.path.read_bytes()
    else:
        stranger = Ledger(
            tmp_path / "x.jsonl", "client-0", DATASET, load_or_create_key(tmp_path / "keys" / "thief.pem")
        )
        with stranger.locked():
            plan(stranger)
        lines = stranger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines))
    with pytest.raises(PrivacyError), make(tmp_path).locked():
        pass
    with pytest.raises(PrivacyError, match="put back"), ledger.locked():
        pass


def test_an_older_copy_is_noticed_by_whoever_saw_the_newer(ledger: Ledger):
    older = ledger.path.read_bytes()
    with ledger.locked():
        charge(ledger, 3)
    ledger.path.write_bytes(older)
    with pytest.raises(PrivacyError, match="an older copy was put back"), ledger.locked():
        pass


@pytest.mark.parametrize("kept", [1, 40, 400])
def test_a_torn_last_line_is_removed_and_its_removal_recorded(kept: int, ledger: Ledger, tmp_path: Path):
    whole = ledger.path.read_bytes()
    with ledger.locked():
        charge(ledger, 3)
    torn = ledger.path.read_bytes()[: len(whole) + kept]
    ledger.path.write_bytes(torn)
    reopened = make(tmp_path)
    with reopened.locked():
        assert [e["type"] for e in reopened.entries] == ["PLAN", "CHARGE", "COMMIT", "CHARGE", "RECOVER"]
        assert reopened.entries[-1]["bytes"] == kept
        charge(reopened, 3)
    check_chain(parse_lines(ledger.path.read_text()), "client-0", ledger.public)


def test_a_line_that_cannot_be_written_is_not_in_the_ledger(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    before = ledger.path.read_bytes()
    real = os.write

    def full_disk(descriptor: int, data: bytes) -> int:
        real(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(PrivacyError, match="No space left"), ledger.locked():
        charge(ledger, 3)
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before
    with ledger.locked():
        charge(ledger, 3)


def test_a_charge_is_synced_file_and_directory_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    made = make(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    with made.locked():
        plan(made)
        synced_before = len(synced)
        charge(made, 1)
    assert synced[:synced_before] == [str(tmp_path), str(made.path)]
    assert synced[synced_before:] == [str(made.path)]


def _hold(folder: str, ready: multiprocessing.synchronize.Event, done: multiprocessing.synchronize.Event) -> None:
    with make(Path(folder)).locked():
        ready.set()
        done.wait(20)


def test_only_one_process_holds_a_data_set_and_a_dead_one_lets_go(ledger: Ledger, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path), ready, done))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(PrivacyError, match="in use by another run"), ledger.locked(timeout=0.2):
        pass
    holder.kill()
    holder.join()
    with ledger.locked(timeout=5):
        charge(ledger, 3)


def test_repeats_of_a_seeded_round_count_once_and_secure_ones_every_time(tmp_path: Path):
    for noise, expected in (("seeded", 3), ("secure", 4)):
        folder = tmp_path / noise
        folder.mkdir()
        made = make(folder)
        with made.locked():
            plan(made, noise=noise)
            charge(made, 1)
            charge(made, 1)
            charge(made, 1, state="3" * 64)  # another state: another release, whatever the noise
            charge(made, 2)
        assert len(charged(made.entries)) == expected


def test_a_missing_directory_says_what_nodes_need(tmp_path: Path):
    lost = Ledger(tmp_path / "nowhere" / "client-0.jsonl", "client-0", DATASET, load_or_create_key(tmp_path / "k.pem"))
    with pytest.raises(PrivacyError, match="all nodes must share its file system"), lost.locked():
        pass


def test_keys_are_private_stable_and_their_hashes_keyed(tmp_path: Path):
    key = load_or_create_key(tmp_path / "a.pem")
    assert (tmp_path / "a.pem").stat().st_mode & 0o777 == 0o600
    assert public_hex(load_or_create_key(tmp_path / "a.pem")) == public_hex(key)
    other = load_or_create_key(tmp_path / "b.pem")
    assert keyed_hash(key, "content", "x") == keyed_hash(key, "content", "x") != keyed_hash(other, "content", "x")
    assert keyed_hash(key, "content", "x") != keyed_hash(key, "dataset", "x")
    (tmp_path / "c.pem").write_text("rubbish")
    with pytest.raises(PrivacyError, match="no usable private key"):
        load_or_create_key(tmp_path / "c.pem")
    assert not verified("zz", "00", b"")


def test_a_lost_key_does_not_start_a_new_budget(ledger: Ledger, tmp_path: Path):
    (tmp_path / "keys" / "client-0.pem").unlink()
    with pytest.raises(PrivacyError, match="signed by another key"), make(tmp_path).locked():
        pass


def test_lines_travel_as_they_stand_in_the_file(ledger: Ledger):
    assert lines_after(ledger.entries, 0).encode() == ledger.path.read_bytes()
    check_chain(parse_lines(lines_after(ledger.entries, 2)), "client-0", ledger.public, after=ledger.entries[1])
