"""FlexLoRA (arXiv 2402.11505): the mean of the clients' products, cut back to the adapters' rank by SVD.

Clients train both factors; Σ p_k B_k·A_k has rank up to K·r, and its best approximation of rank r (Eckart–Young) is the
new adapter. The singular values are split evenly between the factors, √Σ on *both* sides: one side alone would change
the product.

``fisher = "updates"`` cuts back by FWSVD (arXiv 2207.00112) instead: best where the rows of the weight matter most. Its
squared gradients are replaced by the squared changes of B that the clients sent anyway, weighted like the clients, so
it costs no bytes and no privacy; it is a proxy, the finer the fewer local steps. Rows that are all equal or all zero
are cut by the plain SVD, which is logged once.
"""

from __future__ import annotations

import logging
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.lora.exact import mean_of_products
from fedlab.lora.fisher import all_equal, row_weights_of, truncate_weighted
from fedlab.lora.ranks import truncate
from fedlab.lora.robust import coordinate_median
from fedlab.lora.robust_product import robust_low_rank
from fedlab.lora.state import State, local_pairs, modules, select
from strategies.base import LoraStrategy
from strategies.folding import in_order
from strategies.options import NoOptions
from strategies.server.federation import Federation

logger = logging.getLogger("fedlab")


class FlexLoraOptions(NoOptions):
    """Own keys of ``[strategy]`` with ``name = "flexlora"``."""

    split: Literal["sqrt", "left"] = "sqrt"
    mean: Literal["weighted", "robust"] = Field(
        default="weighted",
        description='of the products; "robust": the one low-rank matrix that most agree on, and the heads\' median',
    )
    fisher: Literal["none", "updates"] = "none"


class FlexLora(LoraStrategy):
    """B·A_t+1 = best approximation of rank r of Σ p_k B_k·A_k."""

    effective: ClassVar[str] = "best of rank r of the mean of products"
    linear: ClassVar[bool] = False
    ranks: ClassVar[str] = "SVD, to each its best"
    Options: ClassVar[type[NoOptions]] = FlexLoraOptions

    def __init__(self, config: RunConfig, federation: Federation) -> None:
        super().__init__(config, federation)
        self._told = False  # that rows could not be weighted

    def change(self, state: State, updates: dict[str, State], weights: dict[str, float]) -> State:
        """Of the head; the factors are replaced afterwards."""
        heads = {client: select(update, {"head"}) for client, update in updates.items()}
        assert isinstance(self.options, FlexLoraOptions)
        robust = self.options.mean == "robust" and any(heads.values())
        return coordinate_median(heads, weights) if robust else super().change(state, heads, weights)

    def aggregate(self, state: State, updates: dict[str, State], weights: dict[str, float], round_number: int) -> State:
        """SVD of the mean of the products, in compact form, weighted by rows if so asked; the head is averaged."""
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
            if options.fisher == "none":
                B, A = truncate(B, A, rank, options.split)
            else:
                B, A = truncate_weighted(B, A, rank, self._row_weights(updates, weights, module), options.split)
            averaged[f"{module}.lora_B"], averaged[f"{module}.lora_A"] = B.float(), A.float()
        return averaged

    def _row_weights(self, updates: dict[str, State], weights: dict[str, float], module: str) -> Tensor:
        found = row_weights_of(updates, weights, module)
        if all_equal(found) and not self._told:
            self._told = True
            logger.info('%s: the updates weigh all rows alike; fisher = "updates" is the plain SVD there', module)
        return found
