"""The one way by which something data-dependent leaves a client: charged first, then computed, then committed.

Under example-level DP ``charge`` is called before data is touched, and the charge is on the disk when it returns;
``commit`` keeps the answer for a repeat, writes down the hash of what was computed and only then gives the releases
that may be sent; whatever goes wrong in between closes it, and the charge counts in full. Without DP at the client
nothing is charged, and the release is a public one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from clients.account import ClientAccount
from fedlab.errors import PrivacyError
from fedlab.lora.state import State, digest
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.guard import Guard, Refusal
from fedlab.privacy.release import protected, public
from fedlab.protocol.failures import code_of
from fedlab.protocol.fields import Failure
from fedlab.protocol.messages import Release

Releases = tuple[Release, ...]


@dataclass(frozen=True)
class Asked:
    """What a release is charged under.

    Args:
        guard: of the run, or of its release at a task's end; its plan is signed.
        terms: that were signed.
        event: what is charged.
        round: number of the round.
        received: digest of the state that came.
        request: digest of all that decides the answer.
    """

    guard: Guard
    terms: Mapping[str, Any]
    event: Event
    round: int
    received: str
    request: str


class PendingRelease:
    """One release of one client, between its charge and its commit."""

    def __init__(self, name: str, guarded: bool) -> None:
        """``guarded``: under example-level DP, where nothing is released that was not charged."""
        self.name, self.guarded = name, guarded
        self.failure: Failure | None = None
        self._event: Event | None = None
        self._commit: Callable[[int, str], None] | None = None
        self._keep: Callable[[Releases], None] | None = None
        self._charge = ExitStack()

    def charge(self, account: ClientAccount, asked: Asked) -> Releases | None:
        """Put the charge on the disk; or, where the round was committed before, give what left then, for no charge.

        Raises Refusal, before anything is charged, for what was not signed, cannot be afforded, or was answered
        otherwise.
        """
        if (again := account.repeated(asked.guard, asked.round, asked.request)) is not None:
            return again
        self._commit = self._charge.enter_context(asked.guard.charge(asked.terms, asked.round, asked.received))
        self._event = asked.event
        self._keep = lambda releases: account.keep(asked.guard, asked.round, asked.request, releases)
        return None

    def commit(self, steps: int, arrays: Mapping[str, np.ndarray], content: State, beside: Releases = ()) -> Releases:
        """Commit the values ``content``, which travel as ``arrays``; the releases that may leave, with public ones
        ``beside``.

        Raises PrivacyError if nothing was charged for it, or other steps were executed than charged.
        """
        if not self.guarded:
            return (public(self.name, arrays=arrays), *beside)
        if self._commit is None or self._event is None or self._keep is None:
            raise PrivacyError(f"nothing was charged for the release {self.name!r}; it stays with its owner")
        releases = (protected(self.name, self._event, arrays), *beside)
        self._keep(releases)
        self._commit(steps, digest(content))
        self._charge.close()
        return releases

    def fail(self, error: BaseException) -> None:
        """Close the charge, which then counts in full, and keep the code of what went wrong."""
        self._charge.__exit__(type(error), error, error.__traceback__)
        self.failure = failure_of(error)


def failure_of(error: BaseException, refused: bool | None = None) -> Failure:
    """What the server is told of an error: its code, and whether it was a refusal (unless ``refused`` says)."""
    return Failure(code_of(error), isinstance(error, Refusal) if refused is None else refused)
