"""FlexLoRA (arXiv 2402.11505): the mean of the clients' products, cut back to the adapters' rank by SVD.

Clients train both factors; Σ p_k B_k·A_k has rank up to K·r, and its best approximation of rank r (Eckart–Young) is the new adapter. The
singular values are split evenly between the factors, √Σ on *both* sides: one side alone would change the product.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedlab.lora.exact import mean_of_products
from fedlab.lora.ranks import truncate
from fedlab.lora.robust import coordinate_median, robust_low_rank
from fedlab.lora.state import State, local_pairs, modules, select
from strategies.base import LoraStrategy
from strategies.folding import in_order
from strategies.options import NoOptions


class FlexLoraOptions(NoOptions):
    """Own keys of ``[strategy]`` with ``name = "flexlora"``."""

    split: Literal["sqrt", "left"] = "sqrt"
    mean: Literal["weighted", "robust"] = Field(
        default="weighted",
        description='of the products; "robust": the one low-rank matrix that most agree on, and the heads\' median',
    )


class FlexLora(LoraStrategy):
    """B·A_t+1 = best approximation of rank r of Σ p_k B_k·A_k."""

    effective: ClassVar[str] = "best of rank r of the mean of products"
    linear: ClassVar[bool] = False
    ranks: ClassVar[str] = "SVD, to each its best"
    Options: ClassVar[type[NoOptions]] = FlexLoraOptions

    def change(self, state: State, updates: dict[str, State], weights: dict[str, float]) -> State:
        """Of the head; the factors are replaced afterwards."""
        heads = {client: select(update, {"head"}) for client, update in updates.items()}
        assert isinstance(self.options, FlexLoraOptions)
        robust = self.options.mean == "robust" and any(heads.values())
        return coordinate_median(heads, weights) if robust else super().change(state, heads, weights)

    def aggregate(self, state: State, updates: dict[str, State], weights: dict[str, float], round_number: int) -> State:
        """SVD of the mean of the products, in compact form; the head is averaged."""
        averaged = super().aggregate(state, updates, weights, round_number)
        options = self.options
        assert isinstance(options, FlexLoraOptions)
        shares = in_order(weights, updates)
        for module in modules(state):
            pairs, rank = local_pairs(state, updates, module), state[f"{module}.lora_A"].shape[0]
            if options.mean == "robust":
                B, A = robust_low_rank(pairs, rank, weights=shares)
            else:
                B, A = mean_of_products(pairs, shares)
            B, A = truncate(B, A, rank, split=options.split)
            averaged[f"{module}.lora_B"], averaged[f"{module}.lora_A"] = B.float(), A.float()
        return averaged
