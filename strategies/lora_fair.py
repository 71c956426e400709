"""LoRA-FAIR (arXiv 2411.14961): A and B are averaged, then B̄ is corrected so that B·Ā comes closest to the mean of the
products.

The paper maximises the cosine of (B̄ + ΔB)·Ā and Σ p_k B_k·A_k, less λ‖ΔB‖, by gradient steps. A cosine leaves the
length open; here the squared error takes its place, which has one closed solution: ΔB = (D − B̄·Ā)·Āᵀ·(Ā·Āᵀ + λI)⁻¹
with D = Σ p_k B_k·A_k, λ relative to the mean of Ā·Āᵀ's diagonal. With λ → 0 that is the best approximation of D in Ā's
row space.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedlab.lora.exact import corrected_b
from fedlab.lora.state import State
from strategies.base import Round, ServerState, Strategy, Updates, Weights
from strategies.factors import factors_by_module
from strategies.options import NoOptions


class LoraFairOptions(NoOptions):
    """Own keys of ``[strategy]`` with ``name = "lora-fair"``."""

    ridge: float = Field(
        default=1e-6, gt=0, description="λ, as a share of the mean squared row norm of Ā; larger stays closer to B̄"
    )


class LoraFair(Strategy):
    """B_t+1 = B̄ + ΔB, A_t+1 = Ā."""

    effective: ClassVar[str] = "best of the mean of products in the row space of the mean A"
    linear: ClassVar[bool] = False
    ranks: ClassVar[str] = ""
    Options: ClassVar[type[LoraFairOptions]] = LoraFairOptions
    options: LoraFairOptions

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """Mean of the factors and of the head, then the correction."""
        averaged, server_state = super().aggregate(state, server_state, updates, weights, round)
        for module, pairs, shares in factors_by_module(state, updates, weights):
            B, A = averaged[f"{module}.lora_B"], averaged[f"{module}.lora_A"]
            averaged[f"{module}.lora_B"] = corrected_b(B, A, pairs, shares, self.options.ridge)
        return averaged, server_state
