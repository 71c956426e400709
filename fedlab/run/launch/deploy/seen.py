"""What a server shows of itself (``fedlab.run.monitor``), and what tells a run where to write for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from flwr.proto.control_pb2 import ListNodesRequest

from fedlab.config.server import ServerFile
from fedlab.errors import ConfigError
from fedlab.run.deployment import Deployment
from fedlab.run.launch.deploy import keys
from fedlab.run.launch.deploy.certificates import read_certificate
from fedlab.run.launch.deploy.front import Seen
from fedlab.run.launch.deploy.processes import Supervisor
from fedlab.run.launch.deploy.superlink import Inner
from fedlab.run.monitor.endpoints import RUN_FILE
from fedlab.run.monitor.logs import configure
from fedlab.run.monitor.rounds import JSON, MONITOR

ONLINE = "online"


def server_values(
    file: ServerFile, programs: Supervisor, seen: Seen, let_in: Callable[[], int]
) -> Callable[[], Mapping[str, Any]]:
    """Gives key → value of ``metrics.SERVER`` at each scrape; what cannot be found out is left out.

    Args:
        file: the coordinator's.
        programs: those that are supervised.
        seen: what the front passed on.
        let_in: gives how many node keys are let in.
    """

    def values() -> Mapping[str, Any]:
        return {
            "nodes_live": live_nodes(Inner.of(file)),
            "nodes_registered": None if file.server.insecure else let_in(),
            "restarts": {child.program.name: max(0, child.starts - 1) for child in programs.children},
            "requests": {"passed": seen.requests, "refused": seen.refused},
            "bytes": {"in": seen.bytes_in, "out": seen.bytes_out},
            "certificate_expires": None if file.server.insecure else _until(file.keys / keys.SERVER),
        }

    return values


def live_nodes(inner: Inner) -> int | None:
    """How many nodes are connected; None if the SuperLink does not say."""
    try:
        with inner.control() as control:
            found = control.ListNodes(ListNodesRequest()).nodes_info
        return len([node for node in found if node.status == ONLINE])
    except (httpx.HTTPError, OSError):
        return None


def run_settings(deployment: Deployment) -> dict[str, Any]:
    """What the server's app is told beside its run directory, and how this process logs; nothing without a file of the
    server's.
    """
    if not Path(deployment.server).is_file():
        return {}
    file = ServerFile.load(deployment.server)
    configure(file.log.format)
    seen = {MONITOR: str(file.state / RUN_FILE)} if file.metrics.address is not None else {}
    return {JSON: file.log.format == "json", **seen}


def _until(certificate: Path) -> float | None:
    try:
        return read_certificate(certificate).until.timestamp()
    except ConfigError:
        return None
