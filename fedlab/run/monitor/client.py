"""A client as its own machine sees it: budget, requests, refusals. These figures are for its owner alone.

The resident trainer writes (``ClientMonitor``), the process that supervises it reads (``client_values``,
``client_problem``), so that a trainer needs no network.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlab.errors import PrivacyError
from fedlab.privacy.ledger.guard import spent_of_budget
from fedlab.privacy.ledger.ledger import events, parse_lines
from fedlab.protocol.failures import SENTENCES
from fedlab.protocol.messages import REQUESTS
from fedlab.run.monitor.logs import tell
from fedlab.run.monitor.snapshot import SnapshotFile, read


class ClientMonitor:
    """What a resident trainer says of itself.

    Args:
        client: its id, for the lines of its log.
        path: the snapshot; None where nobody is to read one.
    """

    def __init__(self, client: str, path: Path | None = None) -> None:
        self._client, self._file = client, SnapshotFile(path) if path is not None else None
        self._values: dict[str, Any] = {
            "ready": False,
            "requests": dict.fromkeys(REQUESTS, 0),
            "rounds_answered": 0,
            "refusals": dict.fromkeys(SENTENCES, 0),
            "request_seconds": {},
        }
        self._write()

    def answered(self, kind: str, seconds: float, codes: Iterable[str] = (), round_number: int | None = None) -> None:
        """A request was answered.

        Args:
            kind: of the request, a key of ``REQUESTS``; anything else (it came over the wire) is not counted by name.
            seconds: from its first byte to the reply's last.
            codes: failures in the reply (``fedlab.protocol.failures``); none if everything was given.
            round_number: of the request, where it has one.
        """
        values, given = self._values, [code if code in SENTENCES else "failed" for code in codes]
        for code in given:
            values["refusals"][code] += 1
        if kind in REQUESTS:
            values["requests"][kind] += 1
            values["request_seconds"][kind] = round(seconds, 3)
        values["rounds_answered"] += kind == "train" and not given
        values["last_request"] = time.time()
        self._write()
        name = kind if kind in REQUESTS else "something unknown"
        what = f"asked to {name}: {', '.join(given)}" if given else f"answered {name}"
        tell(f"{what} ({seconds:.1f} s)", client=self._client, round=round_number)

    def budget(self, limit: float | None, delta: float, ledger: Path) -> None:
        """Look up what is spent and what is left, in a ledger that is read as it stands.

        Args:
            limit: ε that may be spent in all; None for no budget.
            delta: at which it is counted.
            ledger: the file, which may not be there yet.
        """
        spent = None
        with contextlib.suppress(PrivacyError):  # whoever is asked for a round says what is wrong with it
            spent = ledger_epsilon(ledger, delta)
        left = None if limit is None or spent is None else max(0.0, limit - spent)
        self._values |= {"budget": limit, "spent": spent, "left": left}
        self._write()

    def ready(self, ready: bool) -> None:
        """Whether model and data are there and a request would be answered."""
        self._values["ready"] = ready
        self._write()

    def close(self) -> None:
        """The trainer ends."""
        self._values["ready"] = False
        self._write()
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        if self._file is not None:
            self._file.write(self._values)


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


def client_values(path: Path, **values: Any) -> dict[str, Any]:
    """Key → value of ``metrics.CLIENT`` from a trainer's snapshot; ``values``: what its supervisor knows itself."""
    found = read(path)
    if found is None:
        return {"up": False, "ready": False, **values}
    shown: Mapping[str, Any] = found.values
    return {**shown, "up": found.alive, "ready": found.alive and bool(shown.get("ready")), **values}


def client_problem(path: Path) -> str | None:
    """Why a client would answer no request now; None if it would."""
    values = client_values(path)
    if not values["up"]:
        return "the trainer is not running"
    return None if values["ready"] else "the trainer has not opened its model and data yet"
