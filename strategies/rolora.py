"""RoLoRA (arXiv 2409.02346, alternating): odd rounds train B, even rounds train A, so that every average is exact.

The published order of some code trains A first, while B is still 0 and A's gradient with it; here B is first.
"""

from __future__ import annotations

from typing import ClassVar

from fedlab.lora.state import State, select
from strategies.base import Strategy


class RoLora(Strategy):
    """B·A of the mean is the mean of B_k·A, or of B·A_k."""

    linear: ClassVar[bool] = True
    effective: ClassVar[str] = "mean of products, exactly"

    def trained_names(self, state: State, round_number: int = 1) -> list[str]:
        """One factor and the head."""
        factor = "lora_B" if round_number % 2 else "lora_A"
        head = {"head"} & set(self.trained_parts(self.config))
        return sorted(select(state, {factor} | head))
