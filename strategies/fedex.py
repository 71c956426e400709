"""FedEx-LoRA (arXiv 2410.09432): A and B are averaged, and what that loses goes into a residual that is folded into the
base.

Σ p_k B_k·A_k = B̄·Ā + R exactly, with R of rank at most (K + 1)·r. R is kept and sent as factors, never as an m×n
matrix. The published code adds it transposed on ``nn.Linear``; ``tests/strategies/test_conformance.py`` holds the
identity for both layouts.
"""

from __future__ import annotations

from typing import ClassVar

from fedlab.lora.exact import residual_of_mean
from fedlab.lora.state import State
from strategies.base import Round, ServerState, Strategy, Updates, Weights
from strategies.factors import factors_by_module
from strategies.folding import fold
from strategies.options import FoldingOptions


class FedExOptions(FoldingOptions):
    """Own keys of ``[strategy]`` with ``name = "fedex"``."""


class FedEx(Strategy):
    """W_t+1 = W_t + s·Σ p_k B_k·A_k for any number of clients that train both factors."""

    effective: ClassVar[str] = "mean of products, exactly (residual)"
    folds: ClassVar[bool] = True
    linear: ClassVar[bool] = False
    ranks: ClassVar[str] = ""
    Options: ClassVar[type[FedExOptions]] = FedExOptions
    options: FedExOptions

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """Mean of the factors, and its residual to the mean of the products."""
        averaged, server_state = super().aggregate(state, server_state, updates, weights, round)
        for module, pairs, shares in factors_by_module(state, updates, weights):
            lost = residual_of_mean(pairs, shares)
            averaged = fold(averaged, module, lost, self.options.residual_rank)
        return averaged, server_state
