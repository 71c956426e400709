"""FlexLoRA (arXiv 2402.11505): the mean of the clients' products, cut back to the adapters' rank by SVD.

Clients train both factors; Σ p_k B_k·A_k has rank up to K·r, and its best approximation of rank r (Eckart–Young) is the new adapter. The
singular values are split evenly between the factors, √Σ on *both* sides: one side alone would change the product.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fedlab.lora.exact import mean_of_products
from fedlab.lora.ranks import truncate
from fedlab.lora.state import State, local_pairs, modules
from strategies.base import LoraStrategy, NoOptions
from strategies.folding import in_order


class FlexLoraOptions(NoOptions):
    """Own keys of ``[strategy]`` with ``name = "flexlora"``."""

    split: Literal["sqrt", "left"] = "sqrt"


class FlexLora(LoraStrategy):
    """B·A_t+1 = best approximation of rank r of Σ p_k B_k·A_k."""

    effective: ClassVar[str] = "best of rank r of the mean of products"
    linear: ClassVar[bool] = False
    Options: ClassVar[type[NoOptions]] = FlexLoraOptions

    def aggregate(self, state: State, updates: dict[str, State], weights: dict[str, float], round_number: int) -> State:
        """SVD of the mean of the products, in compact form; the head is averaged."""
        averaged = super().aggregate(state, updates, weights, round_number)
        options = self.options
        assert isinstance(options, FlexLoraOptions)
        for module in modules(state):
            B, A = mean_of_products(local_pairs(state, updates, module), in_order(weights, updates))
            rank = state[f"{module}.lora_A"].shape[0]
            B, A = truncate(B, A, rank, split=options.split)
            averaged[f"{module}.lora_B"], averaged[f"{module}.lora_A"] = B.float(), A.float()
        return averaged
