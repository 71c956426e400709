"""Keys of ``[strategy]`` that several strategies share, and what they do to the clients' mean.

``robust`` replaces the weighted mean by a rule that a minority cannot steer, ``server`` feeds it to an optimiser. Both
apply where a strategy works from one linear mean; both are post-processing of what the clients sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Literal

import pydantic
import torch
from pydantic import ConfigDict, Field, model_validator

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.average import weighted_mean
from fedlab.lora.robust import RULES
from fedlab.lora.server_optimizer import ServerOptimizer
from fedlab.lora.state import State


class NoOptions(pydantic.BaseModel):
    """Options of a strategy that has none; others derive from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Robust(NoOptions):
    """``strategy.robust``: see ``fedlab.lora.robust``."""

    rule: Literal[
        "coordinate_median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median", "norm_bounded_mean"
    ] = Field(description="what takes the place of the clients' weighted mean")
    trim: float | None = Field(
        default=None, ge=0, lt=0.5, description="trimmed_mean: share of the clients dropped at each end"
    )
    byzantine: int | None = Field(
        default=None, ge=0, description="krum, multi_krum, bulyan: clients that may send anything"
    )
    keep: int | None = Field(default=None, gt=0, description="multi_krum: clients averaged (default n − byzantine)")
    bound: float | None = Field(
        default=None, gt=0, description="norm_bounded_mean: largest norm of an update (default: the median norm)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Robust:
        known = {
            name: p for name, p in inspect.signature(RULES[self.rule]).parameters.items() if p.kind is p.KEYWORD_ONLY
        }
        if odd := sorted(self._given().keys() - known):
            raise ValueError(f'rule = "{self.rule}" has no {odd[0]}; it has {", ".join(known) or "no option"}')
        if missing := [name for name, p in known.items() if p.default is p.empty and name not in self._given()]:
            raise ValueError(f'rule = "{self.rule}" needs {missing[0]}')
        return self

    def combine(self, updates: Mapping[str, State], weights: Mapping[str, float], exposed: int = 0) -> State:
        """The rule's answer. ``exposed`` clients sent what nobody could use and are gone already: so many fewer are
        left to be feared.

        Raises ValueError, for example for too few clients.
        """
        given = self._given()
        if self.byzantine is not None:
            given["byzantine"] = max(0, self.byzantine - exposed)
        return RULES[self.rule](updates, weights, **given)

    def _given(self) -> dict[str, float]:
        return {key: value for key, value in self.model_dump(exclude={"rule"}).items() if value is not None}


class FoldingOptions(NoOptions):
    """Options of every strategy that folds what its clients did into a residual of the base."""

    residual_rank: int | None = Field(
        default=None, gt=0, description="keep at most this rank of the residual; default: all of it, exact"
    )


class MeanOptions(NoOptions):
    """Options of every strategy that works from the clients' mean."""

    robust: Robust | None = None
    server: ServerOptimizer | None = None

    def check(self, config: RunConfig) -> None:
        """Raises ConfigError where a robust rule cannot work: on noised means, on too few clients."""
        if self.robust is None:
            return
        if config.privacy.unit == "client":
            raise ConfigError(
                'strategy.robust with privacy.unit = "client": the noise is calibrated to a mean; use robust without it'
            )
        nobody = {f"client-{i}": {"x": torch.zeros(1)} for i in range(config.clients_per_round)}
        try:
            self.robust.combine(nobody, dict.fromkeys(nobody, 1.0))
        except ValueError as error:
            raise ConfigError(f"strategy.robust with {len(nobody)} clients per round: {error}") from None

    def combine(self, updates: Mapping[str, State], weights: Mapping[str, float], exposed: int = 0) -> State:
        """The clients' weighted mean, or what the robust rule makes of them."""
        return self.robust.combine(updates, weights, exposed) if self.robust else weighted_mean(updates, weights)
