"""What each client has spent, as the server sees it: the events in the ledgers, and what is assumed of clients that did
not answer.

A run's ε is the maximum over its clients, never a mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from functools import lru_cache

from fedlab.privacy.accounting import COARSE, FINE, Event, epsilon

FEW = 16  # clients that differ in what they spent, and are computed with care
PICKED = 4  # of more than that, by each of three rules, for display


class PrivacySpent:
    """What every client spent: its ledger's events and those that are assumed, equal ones merged.

    Args:
        deltas: client → the δ at which its ε is stated.
    """

    def __init__(self, deltas: Mapping[str, float]) -> None:
        self.deltas = dict(deltas)
        self._ledger: dict[str, tuple[Event, ...]] = dict.fromkeys(deltas, ())
        self._assumed: dict[str, list[Event]] = {client: [] for client in deltas}
        self._unproven: dict[str, list[Event]] = {client: [] for client in deltas}

    def enrol(self, client: str, delta: float) -> None:
        """Count a client that came later, or again; what is known of it stays."""
        self.deltas[client] = delta
        self._ledger.setdefault(client, ())
        self._assumed.setdefault(client, [])
        self._unproven.setdefault(client, [])

    def record(self, client: str, events: Iterable[Event]) -> None:
        """Take what the client's ledger shows, all of it; nothing needs to be assumed any more.

        Raises:
            KeyError: the client is unknown.
        """
        if client not in self.deltas:
            raise KeyError(client)
        self._assumed[client] = []
        self._ledger[client] = merged(events)

    def assume(self, client: str, event: Event, for_good: bool = False) -> None:
        """A client was asked and its ledger is not at hand: it may have spent.

        Undone by the next ``record``, unless it is ``for_good``.
        """
        (self._unproven if for_good else self._assumed)[client].append(event)

    def unseen(self) -> list[str]:
        """Clients of which something is assumed."""
        return [client for client, assumed in self._assumed.items() if assumed]

    def assumed(self, client: str) -> tuple[Event, ...]:
        """What is counted as spent although no ledger shows it."""
        return (*self._assumed[client], *self._unproven[client])

    def events(self, client: str) -> tuple[Event, ...]:
        """What the client spent so far."""
        return merged([*self._ledger[client], *self._assumed[client], *self._unproven[client]])

    def epsilons(self) -> dict[str, float]:
        """ε of every client at its own δ (PLD, upper bounds); 0 for one that never took part."""
        distinct = {(self.events(client), delta) for client, delta in self.deltas.items()}
        grid = FINE if len(distinct) <= FEW else COARSE  # both give upper bounds; the coarse one is ten times as fast
        return {client: _epsilon(self.events(client), delta, grid) for client, delta in self.deltas.items()}

    def worst(self) -> float:
        """ε of the client that spent most, for display between rounds; 0 where there are none.

        Exact over up to ``FEW`` kinds of spending. Of more, which would take seconds in every round, it is the largest
        over those with the least noise, those with most steps, and those with the largest Σ T·q²/σ²; a run's result is
        over all of them.
        """
        distinct = list({(self.events(client), delta): None for client, delta in self.deltas.items()})
        if len(distinct) > FEW:
            picked = [one for rule in (_noise, _steps, _cost) for one in sorted(distinct, key=rule)[:PICKED]]
            distinct = list(dict.fromkeys(picked))
        return max((_epsilon(events, delta, COARSE) for events, delta in distinct), default=0.0)


def _noise(spent: tuple[tuple[Event, ...], float]) -> float:
    return min((event.sigma for event in spent[0]), default=math.inf)


def _steps(spent: tuple[tuple[Event, ...], float]) -> tuple[int, float]:
    return -sum(event.steps for event in spent[0]), _noise(spent)


def _cost(spent: tuple[tuple[Event, ...], float]) -> float:
    return -sum(e.steps * (e.q / e.sigma) ** 2 if e.sigma else math.inf for e in spent[0])


def merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal mechanisms with their steps added, in a fixed order."""
    steps: dict[Event, int] = {}
    for event in events:
        kind = Event(event.sampler, event.q, event.sigma, 1)
        steps[kind] = steps.get(kind, 0) + event.steps
    kinds = sorted(steps, key=lambda e: (e.sampler, e.q, e.sigma))
    return tuple(Event(kind.sampler, kind.q, kind.sigma, steps[kind]) for kind in kinds)


def exact(events: Iterable[Event], delta: float) -> float:
    """ε of events on the fine grid, remembered."""
    return _epsilon(merged(events), delta, FINE)


@lru_cache(maxsize=4096)
def _epsilon(events: tuple[Event, ...], delta: float, interval: float) -> float:
    return epsilon(events, delta, interval=interval)


def summary(epsilons: Mapping[str, float]) -> dict[str, float]:
    """Maximum (the run's ε) and median over clients."""
    values = list(epsilons.values())
    return {"max": max(values), "median": statistics.median(values)}
