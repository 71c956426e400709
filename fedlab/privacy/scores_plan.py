"""The release of a client's score on its own held-out records: its mechanism and the DP event that it amounts to.

One Gaussian mechanism without sampling: of all held-out records the share that the model gets right is sent once, after
the last round. One record changes the number of right ones by at most one, so noise of standard deviation σ on that
number is a mechanism of noise multiplier σ (Dwork and Roth, 2014, theorem A.1, by the exact accounting of
``fedlab.privacy.accounting``). How many records are held out is public, as sizes are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, PrivacyError
from fedlab.privacy.accounting import Event
from fedlab.privacy.gram_plan import gram_event
from fedlab.privacy.ledger.terms import plan_terms
from fedlab.privacy.noise import SecureNoise, SeededNoise

ATTEMPTS = 3  # a run that is cut off after its last round asks again when it is resumed
SCORE = "score"  # name of the array that leaves
COUNTED = ("accuracy",)  # primary scores that are a share of records


def scores_event(sigma: float) -> Event:
    """The DP event of the release."""
    return Event("full", 1.0, sigma, 1)


def beside_rounds(config: RunConfig) -> tuple[Event, ...]:
    """What one client is charged beside its rounds in one run: each release once."""
    gram, sigma = config.gram, config.privacy.scores_sigma
    return (
        *((gram_event(gram),) if gram is not None else ()),
        *((scores_event(sigma),) if sigma is not None else ()),
    )


def problem_of_scores(config: RunConfig, primary: str, purged: bool) -> str | None:
    """Why ``privacy.scores_sigma`` would not cover one record, or None.

    Args:
        config: of the run.
        primary: score of its objective.
        purged: whether held-out records are left out whose text is trained on.
    """
    if config.privacy.scores_sigma is None:
        return None
    if primary not in COUNTED:
        return (
            f"privacy.scores_sigma: the primary score is {primary}, which one record can change by any amount; only"
            f" {', '.join(COUNTED)} can be released so: remove it, or score on a file of the server's own ([test])"
        )
    if purged:
        return (
            'privacy.scores_sigma with data.duplicates = "purge": one record that is trained on decides how many'
            ' held-out ones are scored, and the noise covers one; set data.duplicates = "keep"'
        )
    return None


def check_scores(config: RunConfig, primary: str, purged: bool) -> None:
    """Raise ConfigError where ``problem_of_scores`` finds one."""
    if (problem := problem_of_scores(config, primary, purged)) is not None:
        raise ConfigError(problem)


@dataclass(frozen=True)
class ScoresPlan:
    """One client's plan for the release.

    Args:
        sigma: noise multiplier, of the number of held-out records that the model gets right.
        n: training records of the client (public).
        delta: δ of its plan.
        noise: "seeded" or "secure".
    """

    sigma: float
    n: int
    delta: float
    noise: str

    def event(self) -> Event:
        """The DP event of the release."""
        return scores_event(self.sigma)

    def terms(self) -> Mapping[str, Any]:
        """What the client signs: see ``PLAN`` in docs/ledger.md."""
        return plan_terms(
            self.event(),
            unit="example",
            clip=1.0,
            normaliser=1.0,
            delta=self.delta,
            n=self.n,
            participations=ATTEMPTS,
            noise=self.noise,
        )

    def privatise(self, share: float, records: int, seeded: np.random.Generator) -> float:
        """The share of ``records`` with noise on their number; may be below 0 or above 1.

        Raises PrivacyError for what is no share: its sensitivity would be another.
        """
        if records < 1 or not 0.0 <= share <= 1.0:
            raise PrivacyError(f"a share of {records} records is between 0 and 1, got {share}")
        source = SeededNoise(seeded) if self.noise == "seeded" else SecureNoise()
        right = round(share * records)
        return (right + float(source.draw((1,), self.sigma))) / records
