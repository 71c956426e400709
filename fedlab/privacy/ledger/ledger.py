"""The ledger: append-only, chained, signed lines on the owner's disk. ``docs/ledger.md`` fixes the format byte for
byte.

This module writes and reads lines and holds the lock; what may be charged is decided in
``fedlab.privacy.ledger.guard``, what the server countersigns in ``fedlab.privacy.ledger.mirror``.
``fedlab.privacy.audit`` reads the same files with code of its own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlab.errors import PrivacyError
from fedlab.files import fsync_directory
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.keys import public_hex, verified

Entry = dict[str, Any]
VERSION, GENESIS, NO_DATASET, SERVER = 1, "0" * 64, "0" * 64, "server"
COMMON = {"v", "seq", "prev", "type", "time", "run", "owner", "dataset", "hash", "sig"}
FIELDS: dict[str, set[str]] = {
    "PLAN": (
        {"key", "unit", "relation", "event", "clip", "normaliser", "delta", "n"}
        | {"participations", "scope", "budget", "noise", "content", "configuration", "releases", "code", "shared"}
    ),
    "CHARGE": {"round", "plan", "event", "in", "filter"},
    "COMMIT": {"charge", "steps", "out"},
    "ABORT": {"charge", "reason"},
    "RELEASE": {"commit", "receipt"},
    "REFUSE": {"round", "kind", "reason"},
    "RECOVER": {"bytes", "lost"},
    "CLOSE": {"plan", "charges"},
    "START": {"key", "unit", "clients", "config"},
    "RECEIPT": {"key", "round", "client", "number", "head", "out"},
    "ROUND": {"round", "before", "in", "out", "clients"},
    "FINAL": {"heads", "files", "state", "status"},
}
# keys that lines of earlier editions lack: such ledgers are read and continued
LATER: dict[str, set[str]] = {"PLAN": {"configuration", "releases", "shared"}, "START": {"config"}, "ROUND": {"before"}}


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one serialisation that is hashed: sorted keys, no spaces, ASCII, no floating-point numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def event_fields(event: Event) -> dict[str, Any]:
    """An event as a ledger holds it; reals as exact hexadecimal strings."""
    return {
        "sampler": event.sampler,
        "q": float(event.q).hex(),
        "sigma": float(event.sigma).hex(),
        "steps": event.steps,
    }


def event_of(fields: Mapping[str, Any]) -> Event:
    """Inverse of ``event_fields``. Raises PrivacyError for anything that is no event."""
    try:
        return Event(
            fields["sampler"], float.fromhex(fields["q"]), float.fromhex(fields["sigma"]), int(fields["steps"])
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PrivacyError(f"no valid event in the ledger: {dict(fields)} ({error})") from None


def seal(body: Mapping[str, Any], key: Ed25519PrivateKey) -> Entry:
    """The body with its hash and signature."""
    digest = hashlib.sha256(canonical(body)).hexdigest()
    return {**body, "hash": digest, "sig": key.sign(_signed(digest)).hex()}


def _signed(digest: str) -> bytes:
    return b"fedlab-ledger-v1:" + digest.encode()


def authentic(entry: Mapping[str, Any], public: str) -> bool:
    """Whether a line is what the owner of ``public`` signed."""
    body = {k: v for k, v in entry.items() if k not in ("hash", "sig")}
    digest, signature = entry.get("hash"), entry.get("sig")
    if (
        not isinstance(digest, str)
        or not isinstance(signature, str)
        or hashlib.sha256(canonical(body)).hexdigest() != digest
    ):
        return False
    return verified(public, signature, _signed(digest))


def parse_lines(text: str) -> list[Entry]:
    """Lines as objects. Raises PrivacyError that names the line."""
    entries: list[Entry] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise PrivacyError(f"line {number}: not a JSON object")
        entries.append(entry)
    return entries


def check_chain(entries: Iterable[Entry], owner: str, public: str, after: Entry | None = None) -> None:
    """Check that lines continue a chain and that their owner signed them.

    Args:
        entries: the lines, in order.
        owner: whose they must be.
        public: the owner's public key, 64 hex digits.
        after: the line before them; None if they begin the file.

    Raises:
        PrivacyError: at the first line that does not; it names the line.
    """
    for entry in entries:
        seq, prev = (after["seq"] + 1, after["hash"]) if after else (0, GENESIS)
        kind = entry.get("type")
        where = f"ledger of {owner}, line {seq + 1}"
        if kind not in FIELDS or not _complete(kind, entry) or entry["v"] != VERSION:
            raise PrivacyError(f"{where}: unknown kind of line ({kind!r})")
        if entry["seq"] != seq or entry["prev"] != prev:
            raise PrivacyError(f"{where} does not follow the line before it: lines were removed, repeated or reordered")
        if entry["owner"] != owner or (after and entry["dataset"] != after["dataset"]):
            raise PrivacyError(f"{where} belongs to {entry['owner']!r} or to another data set")
        if not authentic(entry, public):
            raise PrivacyError(f"{where} was edited, or signed by another key")
        after = entry


def _complete(kind: str, entry: Entry) -> bool:
    """Whether a line has the keys of its type, or of its type in an earlier edition."""
    keys = COMMON | FIELDS[kind]
    return keys - LATER.get(kind, set()) <= set(entry) <= keys


def charged(entries: Iterable[Entry], run: str | None = None) -> list[Entry]:
    """The CHARGE lines that count: all of them (of ``run`` if given), but exact repeats of a seeded round once."""
    counted: list[Entry] = []
    seeded: set[str] = set()
    seen: set[tuple[Any, ...]] = set()
    for entry in entries:
        if entry["type"] == "PLAN" and entry["noise"] == "seeded":
            seeded.add(entry["hash"])
        if entry["type"] != "CHARGE" or run not in (None, entry["run"]):
            continue
        name = (entry["run"], entry["round"], entry["plan"], entry["in"])
        if entry["plan"] in seeded and name in seen:
            continue
        seen.add(name)
        counted.append(entry)
    return counted


def events(entries: Iterable[Entry], run: str | None = None) -> list[Event]:
    """What was charged, as events."""
    return [event_of(entry["event"]) for entry in charged(entries, run)]


def lines_after(entries: Sequence[Entry], known: int) -> str:
    """Lines from number ``known`` on, as they stand in the file: what is sent to someone who has the ones before."""
    return "".join(canonical(entry).decode() + "\n" for entry in entries[known:])


class Ledger:
    """One owner's file for one data set. Appending needs the lock: ``with ledger.locked(): ledger.append(...)``.

    Args:
        path: the file; its folder must be there.
        owner: the client's id, or ``SERVER``.
        dataset: digest of the data set, 64 hex digits (``NO_DATASET`` for the server's).
        key: signs every line.

    Attributes:
        entries: the verified lines.
        public: the public key, 64 hex digits.
    """

    def __init__(self, path: Path, owner: str, dataset: str, key: Ed25519PrivateKey) -> None:
        self.path, self.owner, self.dataset, self.key = path, owner, dataset, key
        self.public = public_hex(key)
        self.entries: list[Entry] = []  # verified
        self._verified = b""  # the bytes they were read from
        self._descriptor: int | None = None
        self._unsure = False  # whether a line may be in the file that is not in ``entries``

    @contextmanager
    def locked(self, timeout: float = 10.0) -> Iterator[Ledger]:
        """Hold the data set's only lock and read what others appended meanwhile.

        The kernel frees the lock if the process dies.

        Args:
            timeout: seconds to wait for it.

        Raises:
            PrivacyError: another process keeps the lock, the folder is not there, or the file is not what was verified
                before.
        """
        if not self.path.parent.is_dir():
            raise PrivacyError(
                f"the ledger directory {str(self.path.parent)!r} is not on this machine; all nodes must share its file"
                " system"
            )
        created = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock(descriptor, timeout)
            if created:
                fsync_directory(self.path.parent)
            self._descriptor = descriptor
            self._read()
            yield self
        finally:
            self._descriptor = None
            os.close(descriptor)

    def append(self, kind: str, run: str, /, *, durable: bool = True, **fields: Any) -> Entry:
        """Write one line.

        Args:
            kind: its type, a key of ``FIELDS``.
            run: the run's id.
            durable: whether it is on the disk when this returns.
            fields: the type's own fields, all of them.

        Returns:
            The line, with hash and signature.

        Raises:
            PrivacyError: it could not be written whole; then nothing of it is.
        """
        return self.append_all([(kind, fields)], run, durable=durable)[0]

    def append_all(
        self, lines: Sequence[tuple[str, Mapping[str, Any]]], run: str, /, *, durable: bool = True
    ) -> list[Entry]:
        """Write several lines (type, its own keys) as one: all of them are in the file, or none is.

        Wherever an interrupt (Ctrl-C) falls, the next call knows what is in the file: it looks.
        """
        assert self._descriptor is not None, "append needs the lock"
        entries = self.refreshed()
        made: list[Entry] = []
        for kind, fields in lines:
            last = made[-1] if made else entries[-1] if entries else None
            assert set(fields) == FIELDS[kind], f"{kind} has the keys {FIELDS[kind]}, got {set(fields)}"
            made.append(self._sealed(kind, run, fields, last))
        data = b"".join(canonical(entry) + b"\n" for entry in made)
        self._unsure = True
        try:
            if (written := os.write(self._descriptor, data)) != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes written; is the disk full?")
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, len(self._verified))
            raise PrivacyError(
                f"{self.path}: the {lines[0][0]} line could not be written ({error}); nothing is done without it"
            ) from error
        self._verified, self.entries = self._verified + data, [*entries, *made]
        self._unsure = False
        return made

    def refreshed(self) -> list[Entry]:
        """``entries``, which an interrupt may have left behind what is in the file; needs the lock."""
        if self._unsure:
            self._read()
        return self.entries

    def _sealed(self, kind: str, run: str, fields: Mapping[str, Any], last: Entry | None) -> Entry:
        """A line after ``last``, hashed and signed."""
        body = {
            "v": VERSION,
            "seq": last["seq"] + 1 if last else 0,
            "prev": last["hash"] if last else GENESIS,
            "type": kind,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "run": run,
            "owner": self.owner,
            "dataset": self.dataset,
            **fields,
        }
        return seal(body, self.key)

    def _lock(self, descriptor: int, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PrivacyError(
                        f"the data of {self.owner} is in use by another run: {str(self.path)!r} stayed locked for"
                        f" {timeout:g} s"
                    ) from None
                time.sleep(0.02)

    def _read(self) -> None:
        """Verify what is new in the file; a last line that a crash cut off is removed and its removal recorded."""
        assert self._descriptor is not None
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole.startswith(self._verified):
            raise PrivacyError(
                f"{self.path} is not what it was ({len(self.entries)} lines were verified): an older copy was put back,"
                " or it was edited"
            )
        known, entries = (b"", []) if self._unsure else (self._verified, self.entries)
        new = parse_lines(whole[len(known) :].decode(errors="replace"))
        check_chain(new, self.owner, self.public, entries[-1] if entries else None)
        if not entries and new and (new[0]["type"] not in ("PLAN", "START") or new[0]["key"] != self.public):
            raise PrivacyError(
                f"{self.path} was begun with another key than the one at hand; its owner's key file was lost or swapped"
            )
        if new and new[0]["dataset"] != self.dataset:
            raise PrivacyError(f"{self.path} belongs to another data set")
        self._unsure = True  # for as long as one is known without the other
        self._verified, self.entries = whole, [*entries, *new]
        self._unsure = False
        if torn := data[len(whole) :]:
            os.ftruncate(self._descriptor, len(whole))
            os.fsync(self._descriptor)
            if self.entries:
                self.append("RECOVER", self.entries[-1]["run"], bytes=len(torn), lost=hashlib.sha256(torn).hexdigest())
