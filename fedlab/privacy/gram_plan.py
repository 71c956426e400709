"""The release at a task's end (which inputs it used): its mechanism and the DP event that it amounts to, in one object.

One Gaussian mechanism over all of a client's texts, without sampling: the clipped Gram matrices of its texts are summed
and noised once (``fedlab.continual.sketch``). What calibrates σ of the rounds, what the client signs and charges, and
what the server expects all come from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlab.config.tasks import Gram
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.guard import plan_terms
from fedlab.privacy.plan import DPPlan

# A run that is cut off at a task's end asks again when it is resumed: with secure noise a release, and a charge, of its
# own.
ATTEMPTS = 3


def gram_event(settings: Gram, releases: int = 1) -> Event:
    """The DP event of so many releases."""
    return Event("full", 1.0, settings.sigma, releases)


@dataclass(frozen=True)
class GramPlan:
    """One client's plan for the release; what is not its own it takes from the client's plan for the rounds."""

    settings: Gram
    rounds: DPPlan

    def event(self) -> Event:
        """The DP event of one release."""
        return gram_event(self.settings)

    def terms(self) -> Mapping[str, Any]:
        """What the client signs: see ``PLAN`` in docs/ledger.md."""
        return plan_terms(
            self.event(),
            unit="example",
            clip=self.settings.clip,
            normaliser=1.0,
            delta=self.rounds.delta,
            n=self.rounds.n,
            participations=ATTEMPTS,
            noise=self.rounds.noise,
        )
