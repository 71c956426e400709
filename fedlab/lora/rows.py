"""Updates as the rows of one float64 matrix, and weighted statistics over rows: what robust rules are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlab.lora.state import State
from fedlab.seeds import client_order

LARGEST = 1e150  # squares of what is larger overflow float64


@dataclass(frozen=True)
class Rows:
    """The updates as the rows of one matrix, in client order."""

    clients: list[str]
    values: Tensor  # [n, d] float64
    weights: Tensor  # [n] float64 > 0, sum 1
    like: State

    def state(self, vector: Tensor) -> State:
        """The vector [d] as tensors again, in the dtypes that came in."""
        parts = vector.split([self.like[name].numel() for name in sorted(self.like)])
        own = dict(zip(sorted(self.like), parts, strict=True))
        return {name: own[name].reshape(value.shape).to(value.dtype) for name, value in self.like.items()}


def stack_updates(updates: Mapping[str, State], weights: Mapping[str, float]) -> Rows:
    """The updates of clients with a positive weight as rows; their weights as shares.

    Args:
        updates: client → update; all with the same names, shapes and dtypes.
        weights: client → weight ≥ 0; clients without an update may be among them.

    Raises:
        ValueError: no client, a weight that is missing, negative or not finite, no positive weight, updates that
            differ in names, shapes or dtypes, or values that are NaN, infinite or beyond ``LARGEST``.
    """
    clients = _counted(updates, weights)
    like = updates[clients[0]]
    for client in clients:
        _check_alike(client, updates[client], clients[0], like)
    values = [
        torch.cat([updates[client][name].detach().double().reshape(-1) for name in sorted(like)]) for client in clients
    ]
    total = math.fsum(weights[client] for client in clients)
    shares = torch.tensor([weights[client] / total for client in clients], dtype=torch.float64)
    return Rows(clients, torch.stack(values), shares, like)


def _counted(updates: Mapping[str, State], weights: Mapping[str, float]) -> list[str]:
    """The clients of positive weight, in client order."""
    everyone = sorted(updates, key=client_order)
    if not everyone:
        raise ValueError("no update to aggregate")
    if unknown := [client for client in everyone if client not in weights]:
        raise ValueError(f"{unknown[0]} has an update but no weight")
    for client in everyone:
        if not (math.isfinite(weights[client]) and weights[client] >= 0):
            raise ValueError(f"weight of {client} must be finite and >= 0, got {weights[client]}")
    clients = [client for client in everyone if weights[client] > 0]
    if not clients:
        raise ValueError("all weights are 0: there is nothing to aggregate; give at least one client a positive weight")
    return clients


def _check_alike(client: str, update: State, first: str, like: State) -> None:
    """The update has the names, shapes and dtypes of the first client's, and values that can be squared."""
    if odd := update.keys() ^ like.keys():
        raise ValueError(f"{client} and {first} differ in {sorted(odd)[0]!r}")
    for name, value in update.items():
        if value.shape != like[name].shape or value.dtype != like[name].dtype:
            want = f"{like[name].dtype} {tuple(like[name].shape)}"
            raise ValueError(f"{client}: {name} is {value.dtype} {tuple(value.shape)}, want {want}")
        if not usable(value, LARGEST):
            raise ValueError(
                f"{client}: {name} holds NaN, infinite or huge values; exclude the client first (see check_update)"
            )


def usable(value: Tensor, largest: float) -> bool:
    """Whether every entry is a number of at most this size."""
    # In float32 1e150 would be infinity. NaN compares as False.
    return bool((value.double().abs() <= largest).all())


def mean_within(values: Tensor, weights: Tensor) -> Tensor:
    """Σ w·v / Σ w over the first dimension, kept within the values' range, which rounding could leave."""
    mean = (values * weights).sum(0) / weights.expand_as(values).sum(0)
    return mean.clamp(values.min(0).values, values.max(0).values)


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Over the first dimension; weights [n]. Midpoint of the lower and the upper weighted median."""
    ordered, order = torch.sort(values, dim=0, stable=True)
    below = weights[order].cumsum(0)
    half, slack = 0.5 * below[-1], 1e-12 * below[-1]  # sums of equal weights must find their exact half
    lower, upper = (below < half - slack).sum(0, keepdim=True), (below <= half + slack).sum(0, keepdim=True)
    result: Tensor = (0.5 * (ordered.gather(0, lower) + ordered.gather(0, upper))).squeeze(0)
    return result


def row_norms(values: Tensor) -> Tensor:
    """L2 norm of every row, [n, d] → [n]."""
    result: Tensor = torch.linalg.vector_norm(values, dim=1)
    return result
