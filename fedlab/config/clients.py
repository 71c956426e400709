"""Settings that differ between clients ([clients]), by client or by share of the clients: who gets which."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

from fedlab.config import RunConfig
from fedlab.config.sections import percent
from fedlab.seeds import random_stream

T = TypeVar("T")


def initial_ranks(config: RunConfig) -> dict[str, int]:
    """client → rank of its adapter at the start of the run."""
    return _deal(config.clients.rank, config.lora.rank, config.data.clients, config.run.seed, "ranks")


def rate_factor(config: RunConfig, client: str) -> float:
    """What this client's learning rates are multiplied with."""
    if not config.clients.lr:
        return 1.0
    return _rates(tuple(config.clients.lr.items()), config.data.clients, config.run.seed).get(client, 1.0)


@lru_cache(maxsize=8)
def _rates(own: tuple[tuple[str, float], ...], clients: int, seed: int) -> dict[str, float]:
    return _deal(dict(own), 1.0, clients, seed, "rates")


def _deal(own: Mapping[str, T], default: T, count: int, seed: int, purpose: str) -> dict[str, T]:
    """Shares are dealt to the clients in a seeded order, the first share first; who is in none, and not named, gets the
    default.
    """
    clients = [f"client-{i}" for i in range(count)]
    result = dict.fromkeys(clients, default)
    rest = [clients[i] for i in random_stream(seed, purpose).permutation(count)]
    for key, value in own.items():
        chosen = [key]
        if key.endswith("%"):
            taken = round(percent(key) / 100 * count)
            chosen, rest = rest[:taken], rest[taken:]
        result |= dict.fromkeys(chosen, value)
    return result
