"""The release at a task's end (which inputs it used): its mechanism and the DP event that it amounts to, in one object.

One Gaussian mechanism over all of a client's texts, without sampling: the clipped Gram matrices of its texts are summed
and noised once (``fedlab.continual.sketch``). What calibrates σ of the rounds, what the client signs and charges, and
what the server expects all come from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedlab.config.tasks import Gram
from fedlab.continual.sketch import privatise
from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.terms import plan_terms
from fedlab.privacy.noise import SecureNoise, SeededNoise

# A run that is cut off at a task's end asks again when it is resumed: with secure noise a release, and a charge, of its
# own.
ATTEMPTS = 3


def gram_event(settings: Gram, releases: int = 1) -> Event:
    """The DP event of so many releases."""
    return Event("full", 1.0, settings.sigma, releases)


@dataclass(frozen=True)
class GramPlan:
    """One client's plan for the release."""

    settings: Gram
    n: int  # texts of the client (public)
    delta: float
    noise: str  # "seeded" | "secure"

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
            delta=self.delta,
            n=self.n,
            participations=ATTEMPTS,
            noise=self.noise,
        )

    def privatise(self, grams: Mapping[str, Tensor], seeded: np.random.Generator) -> dict[str, Tensor]:
        """The sums with noise on every entry: from ``seeded`` where noise is seeded, else from the operating system."""
        source = SeededNoise(seeded) if self.noise == "seeded" else SecureNoise()
        return privatise(grams, self.settings.sigma, self.settings.clip, source)
