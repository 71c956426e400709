"""What clients ended with, module by module: the loop of every strategy that needs each client's own factors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fedlab.lora.aggregator import Updates, Weights
from fedlab.lora.state import State, local_pairs, modules
from fedlab.seeds import client_order


def factors_by_module(
    state: State, updates: Updates, weights: Weights
) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]], list[float]]]:
    """(module, pairs, shares) for every module, in the order of names.

    Args:
        state: that the clients started from.
        updates: their changes.
        weights: of the clients; those that sent something count, and sum to 1 again.

    Yields:
        The module's name; per client, in client order, its own (B_k [m, r_k], A_k [r_k, n]) in float64; and its share.
    """
    mine = [weights[client] for client in sorted(updates, key=client_order)]
    shares = [weight / sum(mine) for weight in mine]
    for module in modules(state):
        yield module, local_pairs(state, updates, module), shares
