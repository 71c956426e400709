"""What an aggregator with memory looks like: pure, its memory handed in and out, as in optax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedlab.lora.state import State

# what the server keeps between rounds beside the state; exactly what a checkpoint holds
ServerState = dict[str, Tensor]
Updates = Mapping[str, State]  # client → change of every tensor that it sent
Weights = Mapping[str, float]  # client → positive share; they sum to 1


@dataclass(frozen=True)
class Round:
    """What ``aggregate`` knows of a round beside the updates.

    Attributes:
        number: from 1.
        unusable: clients that sent what cannot be used; a robust rule fears so many fewer.
    """

    number: int
    unusable: int = 0


class Aggregator(Protocol):
    """``init`` and ``aggregate``: the same arguments give the same bits, and none of them is edited."""

    def init(self, state: State) -> ServerState:
        """What the server keeps beside the state, before the first round."""
        ...

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """The new state, and the server's, from the old ones and the clients' changes."""
        ...
