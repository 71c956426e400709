"""What a node remembers of a run between messages: its configuration, named by its hash, and who the owners are.

In a simulation it lies in Flower's context, which belongs to this node and this run, so that any process can serve the
next message; a client on a machine of its own has it on its disk (``clients.memory``).
Every request passes its owners' gate here (``Owner.admit``); model and data are opened after it, when they are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from clients.basis import held, keep
from clients.owner import Owners, simulated_owners
from fedlab.config import RunConfig
from fedlab.lora.state import from_wire
from fedlab.protocol import ProtocolError
from fedlab.protocol.messages import DescribeRequest, EvaluateRequest, Request
from fedlab.protocol.sum_messages import ConfirmRequest, PrepareRequest
from fedlab.session import Session

Memory = MutableMapping[str, Any]  # hash → configuration, and "simulation" → run directory; str all of them
SIMULATION = "simulation"


@dataclass(frozen=True)
class Node:
    """What a request is answered with.

    Args:
        config: of the run.
        owners: on this node; all that the request concerns have admitted it.
        opened: opens model and data.
    """

    config: RunConfig
    owners: Owners
    opened: Callable[[], Session]

    @cached_property
    def session(self) -> Session:
        """Model and data, opened at first use."""
        return self.opened()


def owners_of(request: Request, memory: Memory) -> Owners:
    """The owners on a node of a simulation: those of the run's partition.

    Raises ProtocolError where the run's configuration never came.
    """
    config = _configuration(request, memory)
    if config is None:
        raise _never_came(request)
    place = request.simulation if isinstance(request, DescribeRequest) else memory[SIMULATION]
    return simulated_owners(config, place)


def enter(request: Request, owners: Owners, memory: Memory) -> Node:
    """The run that a request belongs to, if the owners that it concerns admit it.

    What a ``describe`` brings (the configuration, what stays as it is during a task) is remembered when it is admitted.

    Raises:
        Refusal: an owner does not admit it.
        ProtocolError: what came is not what its hash says, or never came.
    """
    config = _configuration(request, memory)
    owners.admit(request, asked(request, owners), config)
    if config is None:
        raise _never_came(request)
    if isinstance(request, DescribeRequest):
        for old in [name for name in memory if name != SIMULATION]:  # a run has one configuration
            del memory[old]
        memory[request.run.configuration], memory[SIMULATION] = request.configuration, request.simulation
        if request.basis and keep(owners.store, from_wire(request.basis)) != request.run.basis:
            raise ProtocolError("basis", "the basis that came is not the one that was announced")
    text, basis = memory[request.run.configuration], request.run.basis

    def opened() -> Session:
        session = owners.open(text)
        return replace(session, basis=held(owners.store, basis)) if basis else session

    return Node(config, owners, opened)


def asked(request: Request, owners: Owners) -> Sequence[str]:
    """The clients that a request concerns."""
    if isinstance(request, DescribeRequest):
        return owners.present(request.clients)
    if isinstance(request, EvaluateRequest | PrepareRequest | ConfirmRequest):
        return request.clients
    return [entry.client for entry in request.clients]


def _configuration(request: Request, memory: Memory) -> RunConfig | None:
    """The configuration that a request names, if it is here and is what its name says."""
    name = request.run.configuration
    text = request.configuration if isinstance(request, DescribeRequest) else memory.get(name)
    if text is None:
        return None
    if (found := hashlib.sha256(text.encode()).hexdigest()) != name:
        raise ProtocolError("configuration", f"its hash is {found[:12]}…, not {name[:12]}…")
    return _parsed(text)


@lru_cache(maxsize=4)
def _parsed(text: str) -> RunConfig:
    return RunConfig.parse(text)


def _never_came(request: Request) -> ProtocolError:
    return ProtocolError("run", f"configuration {request.run.configuration[:12]}… never came here; resume the run")
