"""Which client held which record in the runs that share a ledger.

A client's ε is that of its own ledger. It bounds what one record spent only while a record stays with its client:
dealt anew, it would be charged to another one, and no ledger would show the sum. So a directory of shared ledgers keeps
``records.json``, salted hashes of the records by client, and a deal that moves one is refused, as are records that a
ledger of another place has already. A client may gain records that are new, and lose some.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlab.errors import PrivacyError
from fedlab.files import replacing

RECORDS = "records.json"
SAME = 0.1  # of the records in another place's ledger: two data sets share some short texts by chance
Holdings = Mapping[str, Sequence[str]]  # client → hash of each of its records


@dataclass(frozen=True)
class Deal:
    """Who holds what in a run.

    Args:
        hashed: salt → holdings, one for each task of a stream.
        place: where the records are, for people.
        seed: that they were dealt with.
    """

    hashed: Callable[[bytes], Sequence[Holdings]]
    place: str
    seed: int


def check_deal(folder: Path, deal: Deal) -> None:
    """Raise PrivacyError if records were other clients' before, in this ledger directory or in one beside it.

    Args:
        folder: the directory of this source's ledgers; those of other sources lie beside it.
        deal: what is to be charged.
    """
    _checked(folder, deal)
    for other in sorted(folder.parent.glob(f"*/{RECORDS}")):
        if other.parent.resolve() == folder.resolve():
            continue
        salt, held, place, _ = _load(other)
        known = {record for own in held.values() for record in own}
        records = {record for one in deal.hashed(salt) for own in one.values() for record in own}
        if len(known & records) > SAME * len(records):
            raise PrivacyError(
                f"privacy.ledger: {len(known & records)} of {len(records)} texts are in the ledgers of another place,"
                f" {place}; a copy has no budget of its own: name that place in [data], and put changed files there"
            )


def record_deal(folder: Path, deal: Deal) -> None:
    """Keep who holds what, before anything is charged; on the disk when this returns. Raises as ``check_deal``."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(folder.parent):
        check_deal(folder, deal)
        salt, held, seed = _checked(folder, deal)
        tree = {"salt": salt.hex(), "place": deal.place, "seed": seed, "clients": held}
        with replacing(folder / RECORDS) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(tree), encoding="utf-8")


def _checked(folder: Path, deal: Deal) -> tuple[bytes, dict[str, Counter[str]], int]:
    """Salt, holdings with those of the deal, and the seed of the first one."""
    salt, held, _, seed = _load(folder / RECORDS)
    for number, one in enumerate(deal.hashed(salt)):
        now = {client: Counter(records) for client, records in one.items()}
        if moved := moved_records(held, now):
            total = sum(map(len, one.values()))
            cause = (
                f"set data.seed = {seed} and leave data.clients, data.partition and data.limit as they were, or begin"
                " with records that no ledger has"
                if number == 0
                else "give the tasks texts of their own, or a natural partition"
            )
            raise PrivacyError(
                f"privacy.ledger: {moved} of {total} records would go to another client than the one whose ledger has"
                f" what they spent, and no ε would show the sum; {cause}"
            )
        for client, records in now.items():
            held[client] = held.get(client, Counter()) | records
    return salt, held, deal.seed if seed is None else seed


def moved_records(held: Mapping[str, Counter[str]], now: Mapping[str, Counter[str]]) -> int:
    """How many records a client has now that another one had before and has no more."""
    before: Counter[str] = Counter()
    for own in held.values():
        before += own
    moved = 0
    for client, own in now.items():
        for record, count in own.items():
            gained = count - held.get(client, Counter())[record]
            if gained > 0 and before[record]:
                lost = sum(
                    max(0, others[record] - now.get(other, Counter())[record])
                    for other, others in held.items()
                    if other != client and record in others
                )
                moved += min(gained, lost)
    return moved


def _load(path: Path) -> tuple[bytes, dict[str, Counter[str]], str, int | None]:
    """Salt, client → record → how often, the place and the seed; a new salt where there is no file."""
    if not path.is_file():
        return secrets.token_bytes(16), {}, "", None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        held = {client: Counter(records) for client, records in tree["clients"].items()}
        return bytes.fromhex(tree["salt"]), held, str(tree["place"]), int(tree["seed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrivacyError(
            f"{str(path)!r} cannot be read ({type(error).__name__}): without it nobody knows whose ledger a record"
            " is in; put it back"
        ) from None


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    descriptor = os.open(root / ".records.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
