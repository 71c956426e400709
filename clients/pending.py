"""The one way by which something data-dependent leaves a client: charged first, then computed, then committed.

Under example-level DP ``charge`` is called before data is touched, and the charge is on the disk when it returns;
``commit`` writes down the hash of what was computed and only then makes the ``Release`` that may be sent; whatever goes
wrong in between closes it, and the charge counts in full. Without DP at the client nothing is charged, and the release
is a public one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from fedlab.errors import PrivacyError
from fedlab.lora.state import State, digest
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.guard import Guard, Refusal, public_reason
from fedlab.privacy.release import protected, public
from fedlab.protocol.messages import MOST_REASON, Failure, Release


class PendingRelease:
    """One release of one client, between its charge and its commit."""

    def __init__(self, name: str, guarded: bool) -> None:
        """``guarded``: under example-level DP, where nothing is released that was not charged."""
        self.name, self.guarded = name, guarded
        self.failure: Failure | None = None
        self._event: Event | None = None
        self._commit: Callable[[int, str], None] | None = None
        self._charge = ExitStack()

    def charge(self, guard: Guard, terms: Mapping[str, Any], event: Event, round_number: int, received: str) -> None:
        """Put the charge on the disk.

        Raises Refusal, before anything is charged, for what was not signed or cannot be afforded.
        """
        self._commit = self._charge.enter_context(guard.charge(terms, round_number, received))
        self._event = event

    def commit(self, steps: int, arrays: Mapping[str, np.ndarray], content: State) -> Release:
        """Commit the values ``content``, which travel as ``arrays``; the release that may leave.

        Raises PrivacyError if nothing was charged for it, or other steps were executed than charged.
        """
        if not self.guarded:
            return public(self.name, arrays=arrays)
        if self._commit is None or self._event is None:
            raise PrivacyError(f"nothing was charged for the release {self.name!r}; it stays with its owner")
        self._commit(steps, digest(content))
        self._charge.close()
        return protected(self.name, self._event, arrays)

    def fail(self, error: BaseException) -> None:
        """Close the charge, which then counts in full, and keep the reason in words that hold no data."""
        self._charge.__exit__(type(error), error, error.__traceback__)
        self.failure = failure_of(error, self.guarded)


def failure_of(error: BaseException, guarded: bool) -> Failure:
    """What the server is told of an error; under DP (``guarded``) nothing that may quote data."""
    if isinstance(error, Refusal):
        return Failure(str(error)[:MOST_REASON], refused=True)
    text = public_reason(error) if guarded else f"{type(error).__name__}: {error}"
    return Failure(text[:MOST_REASON])
