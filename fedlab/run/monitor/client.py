"""A client as its own machine sees it: budget, requests, refusals. These figures are for its owner alone.

The resident trainer writes them to a file; the process that supervises it shows them (``endpoints.client_endpoint``),
so that a trainer needs no network.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedlab.config.client import ClientFile
from fedlab.errors import PrivacyError
from fedlab.files import below
from fedlab.privacy.ledger.guard import spent_of_budget
from fedlab.privacy.ledger.ledger import events, parse_lines
from fedlab.protocol import Frame, decode
from fedlab.protocol.failures import SENTENCES
from fedlab.protocol.messages import NODE_FAILURE, REPLIES, REQUESTS, NodeFailure
from fedlab.run.monitor.endpoints import CLIENT_FILE
from fedlab.run.monitor.logs import tell
from fedlab.run.monitor.snapshot import SnapshotFile


class ClientMonitor:
    """What a resident trainer says of itself.

    Args:
        client: its id, for the lines of its log.
        path: the snapshot; None where nobody is to read one.
        shared: another user is to read it, as it connects to the socket.
    """

    def __init__(self, client: str, path: Path | None = None, shared: bool = False) -> None:
        self._client, self._file = client, SnapshotFile(path, shared) if path is not None else None
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {
            "ready": False,
            "requests": dict.fromkeys(REQUESTS, 0),
            "rounds_answered": 0,
            "refusals": dict.fromkeys(SENTENCES, 0),
            "request_seconds": {},
        }
        self._write()

    @classmethod
    def of(cls, file: ClientFile) -> ClientMonitor:
        """That of a trainer: its snapshot lies beside its socket, if its file asks for an endpoint."""
        snapshot = file.socket.with_name(CLIENT_FILE) if file.metrics.address is not None else None
        return cls(file.client.id, snapshot, shared=file.client.transport_user is not None)

    def replied(self, kind: object, seconds: float, reply: Frame) -> None:
        """A request of this kind, whatever came as one, was answered with these bytes."""
        self.answered(str(kind), seconds, failure_codes(reply))

    def answered(self, kind: str, seconds: float, codes: Iterable[str] = (), round_number: int | None = None) -> None:
        """A request was answered.

        Args:
            kind: of the request, a key of ``REQUESTS``; anything else (it came over the wire) is not counted by name.
            seconds: from its first byte to the reply's last.
            codes: failures in the reply (``fedlab.protocol.failures``); none if everything was given.
            round_number: of the request, where it has one.
        """
        given = [code if code in SENTENCES else "failed" for code in codes]
        with self._lock:
            values = self._values
            for code in given:
                values["refusals"][code] += 1
            if kind in REQUESTS:
                values["requests"][kind] += 1
                values["request_seconds"][kind] = round(seconds, 3)
            values["rounds_answered"] += kind == "train" and not given
            self._write(last_request=time.time())
        name = kind if kind in REQUESTS else "something unknown"
        what = f"asked to {name}: {', '.join(given)}" if given else f"answered {name}"
        tell(f"{what} ({seconds:.1f} s)", client=self._client, round=round_number)

    def budget(self, limit: float | None, delta: float, ledger: Path) -> None:
        """Look up what is spent and what is left, in a ledger that is read as it stands. Takes 0.1 to 0.3 s.

        Args:
            limit: ε that may be spent in all; None for no budget.
            delta: at which it is counted.
            ledger: the file, which may not be there yet.
        """
        spent = None
        with contextlib.suppress(PrivacyError):  # whoever is asked for a round says what is wrong with it
            spent = ledger_epsilon(ledger, delta)
        left = None if limit is None or spent is None else max(0.0, limit - spent)
        with self._lock:
            self._write(budget=limit, spent=spent, left=left)

    def look_up(self, file: ClientFile) -> None:
        """What is spent and left of the budget in a client's file; nothing where there is none, or nobody reads it."""
        budget = file.counted_budget
        if self._file is not None and budget is not None and file.policy.unit == "example":
            assert budget.delta is not None
            self.budget(budget.epsilon, budget.delta, below(file.home / "ledger", f"{file.client.id}.jsonl"))

    def ready(self, ready: bool) -> None:
        """Whether model and data are there and a request would be answered."""
        with self._lock:
            self._write(ready=ready)

    def close(self) -> None:
        """The trainer ends."""
        with self._lock:
            self._write(ready=False)
            if self._file is not None:
                self._file.close()

    def _write(self, **values: Any) -> None:
        self._values |= values
        if self._file is not None:
            self._file.write(self._values)


def failure_codes(reply: Frame) -> list[str]:
    """Codes in a reply that leaves this machine; empty if everything that was asked for is given."""
    message: Any = decode(reply, {**REPLIES, NODE_FAILURE: NodeFailure})
    if isinstance(message, NodeFailure):
        return [message.code]
    parts = [getattr(part, "reply", part) for part in getattr(message, "clients", ())]
    return [part.failure.code for part in parts if part.failure is not None]


def ledger_epsilon(ledger: Path, delta: float) -> float:
    """ε of everything in a ledger at δ, as its owner's budget counts it; 0 where there is none.

    For display: it neither takes the lock nor verifies signatures, and leaves a line that is being written out. Raises
    PrivacyError for what is no ledger.
    """
    try:
        text = ledger.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 0.0
    except OSError as error:
        raise PrivacyError(f"{ledger} cannot be read: {error.strerror}") from None
    try:
        return spent_of_budget(events(parse_lines(text[: text.rfind("\n") + 1])), delta)
    except (KeyError, TypeError) as error:
        raise PrivacyError(f"{ledger}: a line lacks {error}") from None
