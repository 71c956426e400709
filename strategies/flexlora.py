"""FlexLoRA (arXiv 2402.11505): the mean of the clients' products, cut back to the adapters' rank by SVD.

Clients train both factors; Σ p_k B_k·A_k has rank up to K·r, and its best approximation of rank r (Eckart–Young) is the
new adapter. The singular values are split evenly between the factors, √Σ on *both* sides: one side alone would change
the product.

``fisher = "updates"`` cuts back by FWSVD (arXiv 2207.00112) instead: best where the rows of the weight matter most. Its
squared gradients are replaced by the squared changes of B that the clients sent anyway, weighted like the clients, so
it costs no bytes and no privacy; it is a proxy, the finer the fewer local steps. Rows that are all equal or all zero
are cut by the plain SVD, which is logged in the first round.
"""

from __future__ import annotations

import logging
from typing import ClassVar, Literal

from pydantic import Field

from fedlab.lora.exact import mean_of_products
from fedlab.lora.fisher import all_equal, row_weights_of, truncate_weighted
from fedlab.lora.ranks import truncate
from fedlab.lora.robust import coordinate_median
from fedlab.lora.robust_product import robust_low_rank
from fedlab.lora.state import State, select
from strategies.base import Round, ServerState, Strategy, Updates, Weights
from strategies.factors import factors_by_module
from strategies.options import NoOptions

logger = logging.getLogger("fedlab")


class FlexLoraOptions(NoOptions):
    """Own keys of ``[strategy]`` with ``name = "flexlora"``."""

    split: Literal["sqrt", "left"] = Field(
        default="sqrt", description="singular values go to both factors as roots (sqrt), or to B alone (left)"
    )
    mean: Literal["weighted", "robust"] = Field(
        default="weighted",
        description='of the products; "robust": the one low-rank matrix that most agree on, and the heads\' median',
    )
    fisher: Literal["none", "updates"] = Field(
        default="none", description="rows that matter more when the product is cut back: none, or those that moved"
    )


class FlexLora(Strategy):
    """B·A_t+1 = best approximation of rank r of Σ p_k B_k·A_k."""

    effective: ClassVar[str] = "best of rank r of the mean of products"
    linear: ClassVar[bool] = False
    ranks: ClassVar[str] = "SVD, to each its best"
    Options: ClassVar[type[FlexLoraOptions]] = FlexLoraOptions
    options: FlexLoraOptions

    def change(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """Of the head; the factors are replaced afterwards."""
        heads = {client: select(update, {"head"}) for client, update in updates.items()}
        robust = self.options.mean == "robust" and any(heads.values())
        if robust:
            return coordinate_median(heads, weights), server_state
        return super().change(state, server_state, heads, weights, round)

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """SVD of the mean of the products, in compact form, weighted by rows if so asked; the head is averaged."""
        averaged, server_state = super().aggregate(state, server_state, updates, weights, round)
        plain = list[str]()
        for module, pairs, shares in factors_by_module(state, updates, weights):
            rank = state[f"{module}.lora_A"].shape[0]
            if self.options.mean == "robust":
                B, A = robust_low_rank(pairs, rank, weights=shares)
            else:
                B, A = mean_of_products(pairs, shares)
            if self.options.fisher == "none":
                B, A = truncate(B, A, rank, self.options.split)
            else:
                rows = row_weights_of(updates, weights, module)
                plain += [module] if all_equal(rows) else []
                B, A = truncate_weighted(B, A, rank, rows, self.options.split)
            averaged[f"{module}.lora_B"], averaged[f"{module}.lora_A"] = B.float(), A.float()
        if plain and round.number == 1:
            told = ", ".join(plain)
            logger.info('%s: the updates weigh all rows alike; fisher = "updates" is the plain SVD there', told)
        return averaged, server_state
