"""Whether this process plays the nodes of a simulation: what the machine itself says, never a message.

A node of a simulation works on whatever the run's configuration names, for any client. So no node of a deployment may
be taken for one: the launchers of simulations say it in the node's own configuration; under ``flwr run .``, whose nodes
fedlab does not start, Flower's simulation runtime is known by its processes, which are actors of Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

SIMULATED = "simulated"  # key of a node's configuration


def simulated(node_config: Mapping[str, object]) -> bool:
    """Whether the node with this configuration of its own plays a simulation."""
    if "client" in node_config:
        return False
    return node_config.get(SIMULATED) is True or _in_actor()


def _in_actor() -> bool:
    """Whether this process is an actor of Ray; Ray is not imported to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
