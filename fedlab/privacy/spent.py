"""What each client has spent, in memory: the server's view of a run, composed over the rounds a client truly took part in.

A run's ε is the maximum over its clients, never a mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from fedlab.privacy.accounting import Event, epsilon

FINE, COARSE = 1e-4, 1e-3  # PLD grids; both give upper bounds, they differ by about 2e-4 in ε and tenfold in time


class Spent:
    """Events per client, equal ones merged."""

    def __init__(self, deltas: Mapping[str, float]) -> None:
        self._deltas = dict(deltas)
        self._steps: dict[str, dict[Event, int]] = {client: {} for client in deltas}

    def charge(self, client: str, event: Event) -> None:
        """Enter one round of one client. Raises KeyError for a client nobody declared."""
        kind = Event(event.sampler, event.q, event.sigma, 1)
        self._steps[client][kind] = self._steps[client].get(kind, 0) + event.steps

    def events(self, client: str) -> list[Event]:
        """What the client spent so far."""
        return [Event(kind.sampler, kind.q, kind.sigma, steps) for kind, steps in self._steps[client].items()]

    def epsilons(self) -> dict[str, float]:
        """ε of every client at its own δ (PLD, upper bounds); 0 for one that never took part."""
        distinct = {(tuple(self.events(c)), d) for c, d in self._deltas.items()}
        grid = FINE if len(distinct) <= 16 else COARSE
        return {client: _epsilon(tuple(self.events(client)), delta, grid) for client, delta in self._deltas.items()}

    def worst(self) -> float:
        """ε of the client that spent most, quickly, for display between rounds: the largest Σ T·q²/σ² picks the client."""

        def cost(client: str) -> float:
            return sum(e.steps * (e.q / e.sigma) ** 2 if e.sigma else math.inf for e in self.events(client))

        if not self._deltas:
            return 0.0
        client = max(self._deltas, key=cost)
        return _epsilon(tuple(self.events(client)), self._deltas[client], COARSE)

    def state(self) -> dict[str, list[dict[str, Any]]]:
        """JSON form for a checkpoint."""
        return {client: [asdict(event) for event in self.events(client)] for client in self._steps}

    def restore(self, state: Mapping[str, list[dict[str, Any]]]) -> None:
        """Take back what ``state`` gave."""
        for client, events in state.items():
            self._steps[client] = {}
            for event in events:
                self.charge(client, Event(**event))


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float, interval: float) -> float:
    return epsilon(events, delta, interval=interval)


def summary(epsilons: Mapping[str, float]) -> dict[str, float]:
    """Maximum (the run's ε) and median over clients."""
    values = list(epsilons.values())
    return {"max": max(values), "median": statistics.median(values)}
