"""[privacy]: what one unit is protected to, and what one client may spend in all."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedlab.config.base import Section


def quorum(participants: int, colluding: int) -> int:
    """How many participants of a sum must confirm who is in it, so that no two sets ever are: each honest one confirms
    once, the ``colluding`` ones whatever they like."""
    return (participants + colluding) // 2 + 1


class Budget(Section):
    """[privacy.budget]: what one client may spend on its data, over all runs in its ledger."""

    epsilon: float = Field(gt=0, description="most ε that all charges in one ledger may come to")
    delta: float | None = Field(
        default=None, gt=0, lt=1, description="probability δ at which that ε is computed; default: the plan's δ"
    )


class PrivacySection(Section):
    """[privacy]: what one unit is protected to."""

    unit: Literal["example", "client", "none"] = Field(
        default="none",
        description=(
            "what is protected: one example of one client (clients add the noise), one client with all its records"
            " (the server, trusted, adds it), or nothing"
        ),
    )
    epsilon: float | None = Field(
        default=None,
        gt=0,
        description="ε that the whole run may spend: calibrates the noise for as many rounds as one client may join",
    )
    sigma: float | None = Field(
        default=None, gt=0, description="noise multiplier: standard deviation of the noise / clip"
    )
    delta: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="probability δ of the guarantee; default: min(1e-5, 1/(10 n)) for a client of n examples",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description=(
            "largest joint L2 norm: of one example's gradient (unit = example), of one client's update (client)"
        ),
    )
    participations: int | None = Field(
        default=None,
        gt=0,
        description="most rounds that one client joins; sampling enforces it; default: what balanced sampling needs",
    )
    noise: Literal["seeded", "secure"] = Field(
        default="seeded",
        description=(
            "where noise and batches come from: run.seed, to the bit and for experiments only, or the operating"
            " system, for real data"
        ),
    )
    share_metrics: bool = Field(
        default=False, description="send training loss, clip fraction and local scores, which no noise protects"
    )
    scores_sigma: float | None = Field(
        default=None,
        gt=0,
        description=(
            "after the last round each client's accuracy on its held-out records leaves once, with noise of this"
            " multiplier on the number of right ones, charged to its ledger; default: no such release"
        ),
    )
    survivors: int | None = Field(
        default=None,
        gt=0,
        description=(
            "shared noise: fewest clients whose shares are in a round's sum, which is all that the server sees; with"
            " fewer nothing is released; default: every client adds all of the noise to its own update"
        ),
    )
    colluding: int = Field(
        default=0,
        ge=0,
        description="shared noise: clients that may put what they know together with the server, fewer than survivors",
    )
    masked: bool = Field(
        default=False,
        description=(
            "shared noise: a simulation masks the clients' sums too, which cancel to the bit; a deployment always does"
        ),
    )
    budget: Budget | None = Field(
        default=None, description="what one client may spend on its data, over all runs in its ledger; default: no end"
    )
    ledger: str | None = Field(
        default=None,
        description="directory of ledgers that several runs on the same data share; default: this run's own",
    )

    @model_validator(mode="after")
    def _complete(self) -> PrivacySection:
        if self.unit == "none":
            self._refuse_without_noise()
            return self
        if (self.epsilon is None) == (self.sigma is None):
            raise ValueError("give exactly one of epsilon and sigma")
        if self.clip is None:
            raise ValueError(
                "clip is missing: the joint L2 norm to which a gradient (or a client's update) is clipped, e.g. clip"
                " = 1.0"
            )
        if self.scores_sigma is not None and (self.unit == "client" or self.share_metrics):
            raise ValueError(
                'scores_sigma is for unit = "example" without share_metrics: clients charge it to their ledgers, and'
                " what is shared as it is needs no noise"
            )
        if self.unit == "client" and self.participations is not None:
            raise ValueError('participations has no meaning with unit = "client": every round charges every client')
        self._refuse_half_shared()
        return self

    def _refuse_half_shared(self) -> None:
        """Shares belong to example-level DP, and somebody honest must be left among the survivors."""
        if self.survivors is None:
            if given := [key for key in ("colluding", "masked") if getattr(self, key)]:
                raise ValueError(f"{given[0]} belongs to shared noise; give survivors too, or remove it")
            return
        if self.unit != "example":
            raise ValueError(
                f'survivors = {self.survivors} (shared noise) is for unit = "example", got "{self.unit}": it is clients'
                " that add the noise"
            )
        if self.colluding >= self.survivors:
            raise ValueError(
                f"colluding = {self.colluding} must be below survivors = {self.survivors}: the noise is that of the"
                " honest ones alone"
            )

    def _refuse_without_noise(self) -> None:
        keys = ("epsilon", "sigma", "delta", "clip", "participations", "scores_sigma", "survivors", "budget", "ledger")
        if given := [key for key in keys if getattr(self, key) is not None]:
            off = "remove them, for example with --set 'privacy={unit=\"none\"}'"
            raise ValueError(
                f'{", ".join(given)} given, but unit = "none" adds no noise; set unit = "example", or {off}'
            )
