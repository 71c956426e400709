"""Who masks with whom in a secure sum, and how many shares give a secret.

Up to ``COMPLETE`` participants everybody masks with everybody (Bonawitz et al., arXiv 1611.04482). Above that every
client has k neighbours (Bell et al., eprint 2020/704): the participants stand on a ring, in an order that a hash of the
sum's setting says, and each is a neighbour of the k/2 before and the k/2 after it (a Harary graph).

Let c be the clients that collude with the server, K the participants, t the threshold of shares.

* Complete: t = ⌊(K + c)/2⌋ + 1. Honest clients reveal one thing about a client each, so the server, with the c shares
  of either kind that colluding clients have, gets t of one kind only.
* Ring: let w be the most colluding clients among any k/2 that stand side by side. Then t = k/2 + w + 2, whatever the
  server says of who dropped out: ``docs/privacy.md`` ("Secure sums") has the proof. The order is hashed after the
  colluding clients are fixed, so w is a tail of the hypergeometric distribution: exceeded with probability 2^-40 at
  most, also by a server that tries 2^40 settings.

k is the least for which, beside that, every client keeps t neighbours if up to a quarter of the participants drop out
at random, but for once in 2^20 rounds. If more do the round may give nothing, which costs nobody privacy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from fedlab.config.privacy import quorum
from fedlab.errors import SumRefused

COMPLETE = 64  # participants up to which everybody is everybody's neighbour
FAILURE_BITS, GRINDING_BITS, LIVENESS_BITS = 40, 40, 20


@dataclass(frozen=True)
class Graph:
    """The participants of a sum in the order of the ring.

    Args:
        order: of the participants.
        degree: neighbours of each; even unless the graph is complete.
        threshold: shares that give a secret.
        quorum: participants whose confirmations of who dropped out are needed.
    """

    order: tuple[str, ...]
    degree: int
    threshold: int
    quorum: int

    def neighbours(self, client: str) -> list[str]:
        """Everybody whose masks this client has, in the order in which they get its shares: number 2 and up. Share 1 is
        its own.
        """
        place, count = self.order.index(client), len(self.order)
        if self.degree == count - 1:
            steps = list(range(1, count))
        else:
            steps = [sign * step for step in range(1, self.degree // 2 + 1) for sign in (1, -1)]
        return [self.order[(place + step) % count] for step in steps]


@lru_cache(maxsize=64)
def graph_of(setting: str, participants: tuple[str, ...], survivors: int, colluding: int) -> Graph:
    """The graph of a sum.

    Args:
        setting: digest of all that participants must see alike.
        participants: of the sum, sorted.
        survivors: fewest clients whose values may be added up.
        colluding: clients that may put what they know together with the server.

    Raises:
        SumRefused: fewer participants than survivors, or so few survivors that two sets of them could be confirmed.
    """
    count = len(participants)
    confirming = quorum(count, colluding)
    if count < survivors:
        raise SumRefused(f"{count} clients would take part in a sum that needs {survivors} survivors; draw more")
    if survivors < max(confirming, 2):
        raise SumRefused(
            f"survivors must be at least {max(confirming, 2)} for {count} participants of which {colluding} may"
            f" collude, got {survivors}: two different sums could be confirmed"
        )
    degree, threshold = (count - 1, confirming) if count <= COMPLETE else ring(count, colluding)
    return Graph(_ordered(setting, participants), degree, threshold, confirming)


@lru_cache(maxsize=256)
def ring(count: int, colluding: int) -> tuple[int, int]:
    """Neighbours of each of so many participants, and the threshold; the complete graph where no ring will do."""
    lost = count // 4
    for half in range(2, (count - 1) // 2):
        window = _window(count, colluding, half)
        threshold = half + window + 2
        spare = 2 * half + 1 - threshold  # a client's own share is there if it is
        if window < half and spare >= 0 and _tail(count, lost, 2 * half, spare) + math.log2(count) <= -LIVENESS_BITS:
            return 2 * half, threshold
    return count - 1, quorum(count, colluding)


def _window(count: int, colluding: int, half: int) -> int:
    """Colluding clients among any ``half`` side by side, at most, but for 2^-(FAILURE_BITS + GRINDING_BITS)."""
    allowed = -(FAILURE_BITS + GRINDING_BITS) - math.log2(count)  # every place on the ring begins a window
    low, high = 0, min(colluding, half)
    while low < high:
        middle = (low + high) // 2
        if _tail(count, colluding, half, middle) <= allowed:
            high = middle
        else:
            low = middle + 1
    return low


def _tail(count: int, marked: int, drawn: int, most: int) -> float:
    """log2 of the probability that more than ``most`` of ``drawn`` out of ``count`` are among ``marked`` ones."""
    terms = [
        _choose(marked, i) + _choose(count - marked, drawn - i) - _choose(count, drawn)
        for i in range(max(most + 1, drawn - (count - marked)), min(marked, drawn) + 1)
    ]
    if not terms:
        return -math.inf
    highest = max(terms)
    return (highest + math.log(sum(math.exp(term - highest) for term in terms))) / math.log(2)


def _choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _ordered(setting: str, participants: Collection[str]) -> tuple[str, ...]:
    """An order that nobody can choose but by trying settings."""

    def place(client: str) -> bytes:
        return hashlib.sha256(f"fedlab-sum-ring-v1:{setting}:{client}".encode()).digest()

    return tuple(sorted(participants, key=place))
