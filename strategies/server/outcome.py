"""What came back from the clients: of a round of training, and of scoring on their own examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedlab.lora.state import State
from fedlab.privacy.ledger.ledger import Entry
from fedlab.seeds import client_order

UNUSABLE = "unusable update"  # what the reason of an exclusion begins with where a client sent what cannot be used


@dataclass
class TrainOutcome:
    """What came back from one round of training."""

    updates: dict[str, State] = field(default_factory=dict)  # in client order
    excluded: dict[str, str] = field(default_factory=dict)  # client → why its update was not used
    silent: set[str] = field(default_factory=set)  # clients whose ledger did not come back: they may have spent
    # client → how often it was asked beyond the first time: it may have been charged each time
    again: Counter[str] = field(default_factory=Counter)
    unproven: set[str] = field(default_factory=set)  # clients whose ledger does not show what they sent
    commits: dict[str, Entry] = field(default_factory=dict)  # client → the ledger line that commits its update
    # client → examples, steps, loss, clip_fraction, seconds
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    # (start, end) of each node's training, seconds since the epoch
    busy: list[tuple[float, float]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    # under shared noise, in place of updates: Σ of the shares of the members, int64 modulo 2^64
    total: dict[str, np.ndarray] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    lost: str = ""  # why nothing can be had of their sum; "" if something can

    @property
    def used(self) -> list[str]:
        """Clients whose update, or share of a sum, came and can be used; in client order."""
        return sorted({*self.updates, *self.members}, key=client_order)

    def add_share(self, arrays: Mapping[str, np.ndarray], members: Iterable[str]) -> None:
        """Add a sum of these clients' shares."""
        self.total = {name: self.total[name] + value if self.total else value for name, value in arrays.items()}
        self.members += members

    def add(self, later: TrainOutcome) -> None:
        """Enter what came back of those who were asked again: it takes the place of why they were missing."""
        for client in (*later.used, *later.excluded):
            self.excluded.pop(client, None)
        if later.members:
            self.add_share(later.total, later.members)
        self.updates = dict(sorted({**self.updates, **later.updates}.items(), key=lambda item: client_order(item[0])))
        self.excluded |= later.excluded
        self.silent -= set(later.used) | (set(later.excluded) - later.silent)
        self.again += later.again
        self.again.update((*later.used, *later.excluded))
        self.unproven |= later.unproven
        self.commits |= later.commits
        self.metrics |= later.metrics
        self.busy += later.busy
        self.bytes_up += later.bytes_up
        self.bytes_down += later.bytes_down

    @property
    def unusable(self) -> int:
        """How many clients sent an update that cannot be used."""
        return sum(reason.startswith(UNUSABLE) for reason in self.excluded.values())


@dataclass
class EvaluateOutcome:
    """Primary score of the global model on the clients' own held-out examples."""

    scores: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    busy: list[tuple[float, float]] = field(default_factory=list)


def mean_loss(outcome: TrainOutcome) -> float:
    """The clients' training loss per example; NaN where nobody says."""
    metrics = outcome.metrics.values()
    examples = sum(m["examples"] for m in metrics)
    return sum(m["loss"] * m["examples"] for m in metrics) / examples if examples else float("nan")


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals: the time in which at least one node was working."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
