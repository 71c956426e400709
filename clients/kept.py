"""What a client answered to a round, kept whole: a repeat of the request gets the same bytes, for no further charge.

One file per client and run, ``kept/<client>-<run>.reply`` beside the ledger. It is replaced in the run's next round;
that of the last round is deleted when the run is over. It holds nothing but what was to leave.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedlab.files import below, write
from fedlab.protocol import Frame, ProtocolError, decode, encode
from fedlab.protocol.fields import Digest, Positive, Strict
from fedlab.protocol.messages import Release

KIND = "kept"


@dataclass(frozen=True)
class Kept(Strict):
    """One answer: of which round, to what, and all that left."""

    round: Positive
    asked: Digest  # of everything in the request that decides the answer
    releases: tuple[Release, ...]


def kept_path(ledgers: Path, client: str, run: str) -> Path:
    """Where the answer to a client's last round of a run lies."""
    return below(ledgers, KIND, f"{client}-{run}.reply")


def keep(path: Path, answer: Kept) -> None:
    """Write an answer, whole and on the disk when this returns."""
    frame = encode(KIND, answer)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    head = json.dumps({"header": frame.header.decode(), "table": frame.table.decode()})
    write(path, head.encode() + b"\n" + frame.body)


def forget(ledgers: Path, client: str, runs: Iterable[str]) -> None:
    """Delete a client's answers of runs that are over: a repeat is refused from now on."""
    for run in runs:
        kept_path(ledgers, client, run).unlink(missing_ok=True)


def load(path: Path) -> Kept | None:
    """The answer in a file; None if there is none that is whole."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        parts = json.loads(head)
        return decode(Frame(KIND, parts["header"].encode(), parts["table"].encode(), body), {KIND: Kept})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ProtocolError):
        return None
