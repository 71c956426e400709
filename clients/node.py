"""What a node remembers of a run between messages: its configuration, named by its hash, and who the owners are.

It lies in Flower's context, which belongs to this node and this run, so that any process can serve the next message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from clients.basis import held, keep
from clients.owner import Owners, owners_of
from fedlab.errors import FedlabError
from fedlab.lora.state import from_wire
from fedlab.protocol import ProtocolError
from fedlab.protocol.messages import DescribeRequest, RunReference
from fedlab.session import Session, open_session

Memory = MutableMapping[str, Any]  # hash → configuration, and "simulation" → run directory; str all of them
SIMULATION = "simulation"


@dataclass(frozen=True)
class Node:
    """The session and the owners that a request is answered with."""

    session: Session
    owners: Owners


def join(request: DescribeRequest, memory: Memory, node_config: Mapping[str, object]) -> Node:
    """Take a run's configuration, and what stays as it is during this task, and open the run.

    Raises ProtocolError where they are not what their hashes say.
    """
    name = hashlib.sha256(request.configuration.encode()).hexdigest()
    if name != request.run.configuration:
        raise ProtocolError("configuration", f"its hash is {name[:12]}…, not {request.run.configuration[:12]}…")
    memory[name], memory[SIMULATION] = request.configuration, request.simulation
    if request.basis:
        found = enter(replace(request.run, basis=""), memory, node_config)
        if keep(found.owners.store, from_wire(request.basis)) != request.run.basis:
            raise ProtocolError("basis", "the basis that came is not the one that was announced")
    return enter(request.run, memory, node_config)


def enter(run: RunReference, memory: Memory, node_config: Mapping[str, object]) -> Node:
    """The run that a request belongs to. Raises FedlabError if this node never joined it, or lacks its basis."""
    if run.configuration not in memory:
        raise FedlabError(f"configuration {run.configuration[:12]}… never came to this node; resume the run")
    session = open_session(memory[run.configuration])
    owners = owners_of(node_config, session.config, run.run, memory[SIMULATION])
    if run.basis:
        session = replace(session, basis=held(owners.store, run.basis))
    return Node(session, owners)
