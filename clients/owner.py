"""One data owner as its machine knows it: who it is, where it keeps what is its own, and what it may spend.

A node has the owner that its own configuration names (``client``, with ``ledger``, ``personal``, ``bases``,
``budget-epsilon`` and ``budget-delta`` beside it); a simulation's nodes have the owners that the run's partition makes.
Which of the two it is, is decided here and asked nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedlab.config import RunConfig
from fedlab.config.sections import Budget
from fedlab.errors import FedlabError, PrivacyError
from fedlab.identifiers import checked_identifier
from fedlab.lora.state import State
from fedlab.run.personal import load_personal, save_personal
from fedlab.run.places import Places, simulated_places

HOME = ".fedlab"


@dataclass(frozen=True)
class Owner:
    """One client and what is its own."""

    client: str
    places: Places
    budget: Budget | None = None

    def load_personal(self, round_number: int) -> State:
        """What it kept of the model before a round (from 1); empty if nothing yet."""
        return load_personal(self.places.personal, self.client, round_number)

    def save_personal(self, round_number: int, tensors: State) -> None:
        """Keep what a round left."""
        save_personal(self.places.personal, self.client, round_number, tensors)


class Owners(Protocol):
    """The owners on one node."""

    @property
    def exclusive(self) -> bool:
        """Whether they are on this node and on no other."""

    @property
    def store(self) -> Path:
        """Where the node keeps what came once."""

    def present(self, asked: Sequence[str]) -> list[str]:
        """Who answers when the server asks who is there, and names ``asked`` itself."""

    def one(self, client: str) -> Owner:
        """The owner of this name. Raises FedlabError if it is not here."""


@dataclass(frozen=True)
class SingleOwner:
    """The one owner of a machine of its own."""

    owner: Owner
    exclusive: bool = True

    @property
    def store(self) -> Path:
        """Where the node keeps what came once."""
        return self.owner.places.store

    def present(self, asked: Sequence[str]) -> list[str]:
        """Itself, whoever was asked for."""
        return [self.owner.client]

    def one(self, client: str) -> Owner:
        """Itself. Raises FedlabError for another name."""
        if client != self.owner.client:
            raise FedlabError(f"this node belongs to {self.owner.client}; it was asked to act for {client}")
        return self.owner


@dataclass(frozen=True)
class SimulatedOwners:
    """All owners of a simulation, which any of its nodes can play."""

    config: RunConfig
    places: Places
    exclusive: bool = False

    @property
    def store(self) -> Path:
        """Where the nodes keep what came once."""
        return self.places.store

    def present(self, asked: Sequence[str]) -> list[str]:
        """Those that this node is asked to play."""
        return list(asked)

    def one(self, client: str) -> Owner:
        """Any client of the partition. Raises PrivacyError if its ledger's directory is not on this machine."""
        if self.config.private and not self.places.ledgers.is_dir():
            raise PrivacyError(
                f"the ledgers' directory {str(self.places.ledgers)!r} is not on this machine; put it on a file system"
                " that all nodes share"
            )
        return Owner(client, self.places, self.config.privacy.budget)


def owners_of(node: Mapping[str, object], config: RunConfig, run: str, simulation: str) -> Owners:
    """The owners of the node with this configuration of its own.

    Args:
        node: the node's configuration, set by whoever started it.
        config: the run's.
        run: its id.
        simulation: the run directory of a simulation; a node with an owner of its own does not look at it.

    Raises:
        ConfigError: the node's client or the run is named as no file may be.
    """
    if "client" not in node:
        return SimulatedOwners(config, simulated_places(config, Path(simulation)))

    def place(key: str) -> Path:
        return Path(str(node.get(key, Path.home() / HOME / key)))

    places = Places(place("ledger"), place("personal") / checked_identifier(run, "run"), place("bases"))
    return SingleOwner(Owner(checked_identifier(str(node["client"]), "client"), places, _budget(node)))


def _budget(node: Mapping[str, object]) -> Budget | None:
    limit, delta = node.get("budget-epsilon"), node.get("budget-delta")
    if limit is None:
        return None
    return Budget(epsilon=float(str(limit)), delta=None if delta is None else float(str(delta)))
