"""FLoRA (arXiv 2409.05976): the clients' adapters are stacked, merged into the base, and a new adapter is begun in the
next round.

State machine, which the paper leaves open: a round begins with B = 0 and a newly drawn A; clients train; Σ p_k B_k·A_k,
which is exact, is added to the residual; B returns to 0 and A is drawn anew from the run's seed and the round. Nothing
of a client's factors outlives it.
``train = "B"`` keeps the drawn A fixed within a round: half the bytes, half the values to noise, and still a new
subspace each round.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedlab.config import RunConfig
from fedlab.lora.exact import mean_of_products
from fedlab.lora.state import State
from fedlab.models.adapters import draw_a
from strategies.base import Round, ServerState, Strategy, Updates, Weights
from strategies.factors import factors_by_module
from strategies.folding import fold
from strategies.options import FoldingOptions


class FLoraOptions(FoldingOptions):
    """Own keys of ``[strategy]`` with ``name = "flora"``."""

    train: Literal["both", "B"] = Field(default="both", description="factors that clients train: both, or B alone")
    redraw: Literal["orthonormal", "kaiming"] = Field(
        default="orthonormal", description="how A is drawn anew in every round, as for lora.init_a"
    )


class FLora(Strategy):
    """W_t+1 = W_t + s·Σ p_k B_k·A_k, then a new adapter."""

    effective: ClassVar[str] = "mean of products, exactly (merged)"
    folds: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    ranks: ClassVar[str] = "stacking, exact"
    Options: ClassVar[type[FLoraOptions]] = FLoraOptions
    options: FLoraOptions

    @classmethod
    def factors(cls, config: RunConfig) -> frozenset[str]:
        """B alone where A is fixed within a round."""
        B_alone = FLoraOptions(**config.strategy.options).train == "B"
        return frozenset({"lora_B"}) if B_alone else cls.trains

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """Fold the mean of the products, average the head, begin a new adapter."""
        averaged, server_state = super().aggregate(state, server_state, updates, weights, round)
        for module, pairs, shares in factors_by_module(state, updates, weights):
            mean = mean_of_products(pairs, shares)
            averaged = fold(averaged, module, mean, self.options.residual_rank)
            A = state[f"{module}.lora_A"]
            averaged[f"{module}.lora_B"] = torch.zeros_like(state[f"{module}.lora_B"])
            averaged[f"{module}.lora_A"] = draw_a(
                self.options.redraw, A.shape, self.config.sampling_seed, "redraw", module, round.number
            )
        return averaged, server_state
