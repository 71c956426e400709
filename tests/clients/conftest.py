"""A node with owners of its own, and requests to it, without a server and without Flower."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from clients.node import Node
from clients.owner import Owner, SimulatedOwners, SingleOwner
from clients.policy import SimulationPolicy
from fedlab.config.sections import Budget
from fedlab.lora.state import to_wire
from fedlab.models.adapters import initial_state
from fedlab.protocol.fields import RunReference
from fedlab.protocol.messages import ClientOrder, TrainRequest
from fedlab.run.places import Places
from fedlab.session import Session

RUN = "a" * 32


def places_at(path: Path) -> Places:
    return Places(path, path / "personal", path / "bases", path / "log.txt")


def owner_at(path: Path, client: str = "client-0", budget: float | None = None) -> Owner:
    """An owner that allows what a simulation's allow."""
    return Owner(client, places_at(path), SimulationPolicy("example"), "", Budget(epsilon=budget) if budget else None)


def own_node(session: Session, path: Path, budget: float | None = None) -> Node:
    """The node of client-0 alone, with its ledger in ``path``."""
    return Node(session.config, SingleOwner(owner_at(path, budget=budget)), lambda: session)


def simulated_node(session: Session, path: Path) -> Node:
    """A simulation's node, with ledgers in ``path``."""
    return Node(session.config, SimulatedOwners(session.config, places_at(path)), lambda: session)


def run_reference(session: Session) -> RunReference:
    configuration = hashlib.sha256(session.config.to_toml().encode()).hexdigest()
    return RunReference(RUN, configuration, ("head", "lora_B"))


def train_request(session: Session, cohort: list[str], **changes: Any) -> TrainRequest:
    """One round from the first state; ``changes`` replace fields."""
    state = initial_state(session.model, session.config.lora, 0)
    fields: dict[str, Any] = {
        "run": run_reference(session),
        "round": 1,
        "clients": tuple(ClientOrder(client, 0, session.config.lora.rank) for client in cohort),
        "passes": (len(cohort),),
        "trained": tuple(name for name in state if not name.endswith("lora_A")),
        "personal": (),
        "wire": "float32",
        "state": to_wire(state),
    }
    return TrainRequest(**{**fields, **changes})


@pytest.fixture
def helpers() -> Any:
    """The functions of this file, for tests that import nothing relative."""
    import sys

    return sys.modules[__name__]
