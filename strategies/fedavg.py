"""FedAvg on LoRA factors (FedIT, arXiv 2305.05644): A and B are each averaged.

The mean of products is not the product of means, so the averaged adapter is not the average of the clients' weight
changes (unless A is equal everywhere); under DP the noises of A and B multiply.
"""

from __future__ import annotations

from typing import ClassVar

from strategies.base import Strategy


class FedAvg(Strategy):
    """A_t+1 = Σ p_k A_k, B_t+1 = Σ p_k B_k."""

    linear: ClassVar[bool] = True
