"""Weighted means over clients whose bits depend on nothing but the values: summed in client order, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedlab.lora.state import State
from fedlab.seeds import client_order


def client_weights(sizes: Mapping[str, int], kind: str) -> dict[str, float]:
    """Weights that sum to 1: proportional to the clients' (public) sizes, or all equal.

    Raises ValueError for an unknown kind, no client, or a size that is not positive.
    """
    if kind not in ("examples", "uniform"):
        raise ValueError(f"weights must be 'examples' or 'uniform', got {kind!r}")
    if not sizes:
        raise ValueError("no client to weigh")
    for client, size in sizes.items():
        if size <= 0:
            raise ValueError(f"{client} declares {size} examples; a weight needs at least one")
    total = sum(sizes.values())
    return {client: (size / total if kind == "examples" else 1 / len(sizes)) for client, size in sizes.items()}


def weighted_mean(updates: Mapping[str, State], weights: Mapping[str, float]) -> State:
    """Σ w_k·u_k / Σ w_k per name. Permuting the clients changes no bit.

    Args:
        updates: client → {name: tensor}; all clients hold the same names and shapes.
        weights: client → weight ≥ 0, finite, not all zero.

    Returns:
        name → mean, computed in float64, in the dtype that came in.

    Raises:
        ValueError: no client, names or shapes that differ, an entry that is NaN or infinite, or unusable weights.
    """
    clients = sorted(updates, key=client_order)
    if not clients:
        raise ValueError("no update to average")
    bad = {c: weights[c] for c in clients if not (math.isfinite(weights[c]) and weights[c] >= 0)}
    if bad:
        raise ValueError(f"weight of {next(iter(bad))} must be finite and >= 0, got {next(iter(bad.values()))}")
    total = math.fsum(weights[c] for c in clients)
    if not total > 0:
        raise ValueError("all weights are 0: there is nothing to average")
    first = updates[clients[0]]
    result: State = {}
    for client in clients:
        if odd := updates[client].keys() ^ first.keys():
            raise ValueError(f"{client} and {clients[0]} differ in {sorted(odd)[0]!r}")
    for name, like in first.items():
        mean = torch.zeros_like(like, dtype=torch.float64)
        for client in clients:
            if updates[client][name].shape != like.shape:
                raise ValueError(
                    f"{client}: {name} has shape {tuple(updates[client][name].shape)}, want {tuple(like.shape)}"
                )
            mean += updates[client][name].double() * (weights[client] / total)
        if not bool(torch.isfinite(mean).all()):
            bad_client = next(
                (c for c in clients if not bool(torch.isfinite(updates[c][name]).all())), "the sum of all clients"
            )
            raise ValueError(f"{bad_client}: {name} holds NaN or infinite entries; exclude that update")
        result[name] = mean.to(like.dtype)
    return result
