"""Settings that differ between clients ([clients]), by name or by share of the clients: who gets which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

from fedlab.config import RunConfig
from fedlab.config.data import percent
from fedlab.errors import ConfigError
from fedlab.identifiers import identifier
from fedlab.seeds import random_stream

T = TypeVar("T")


def initial_ranks(config: RunConfig, clients: Sequence[str]) -> dict[str, int]:
    """Client id → rank of its adapter at the start of the run.

    Args:
        clients: ids of all clients of the run, in client order.
    """
    return _assign(config.clients.rank, config.lora.rank, clients, config.run.seed, "ranks")


def rate_factor(config: RunConfig, client: str, clients: Sequence[str]) -> float:
    """What this client's learning rates are multiplied with; ``clients`` as in ``initial_ranks``."""
    if not config.clients.lr:
        return 1.0
    return _rates(tuple(config.clients.lr.items()), tuple(clients), config.run.seed).get(client, 1.0)


def check_names(config: RunConfig, clients: Sequence[str]) -> None:
    """Raises ConfigError that names the key if [clients] names somebody who is none of the clients."""
    for key, own in (("rank", config.clients.rank), ("lr", config.clients.lr)):
        for name in own:
            if not name.endswith("%") and _client_of(name, clients) is None:
                shown = ", ".join(clients) if len(clients) <= 8 else f"{clients[0]}, {clients[1]}, … {clients[-1]}"
                raise ConfigError(f"clients.{key}: {name} is none of the {len(clients)} clients; they are {shown}")


@lru_cache(maxsize=8)
def _rates(own: tuple[tuple[str, float], ...], clients: tuple[str, ...], seed: int) -> dict[str, float]:
    return _assign(dict(own), 1.0, clients, seed, "rates")


def _assign(own: Mapping[str, T], default: T, clients: Sequence[str], seed: int, purpose: str) -> dict[str, T]:
    """Shares take clients in a seeded order, the first share first; who is in none, and not named, gets the default."""
    result = dict.fromkeys(clients, default)
    rest = [clients[i] for i in random_stream(seed, purpose).permutation(len(clients))]
    for key, value in own.items():
        if key.endswith("%"):
            taken = round(percent(key) / 100 * len(clients))
            chosen, rest = rest[:taken], rest[taken:]
            result |= dict.fromkeys(chosen, value)
        elif (client := _client_of(key, clients)) is not None:
            result[client] = value
    return result


def _client_of(name: str, clients: Sequence[str]) -> str | None:
    """The id of the client of this name, as its owner wrote it or as the run's files do; None if there is none."""
    return next((one for one in (identifier(name), name) if one in clients), None) if name else None
