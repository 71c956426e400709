"""Flower's SuperLink as a program: what it is started with, how it is reached, and which nodes it knows.

It listens on loopback alone, with TLS; clients reach it through the front. Its control interface starts runs and its
runtime interface hands out the server app's task, so both stay on this machine, the second behind a secret as well.
State is a SQLite file, so that a restarted server knows its nodes and runs.
"""

from __future__ import annotations

import ssl
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedlab.config.server import ServerFile, is_loopback, split_address
from fedlab.errors import ConfigError, RunFailed
from fedlab.run.launch.deploy.keys import CA, SECRET, SERVER, SERVER_KEY, NodeKey
from fedlab.run.launch.deploy.processes import Program
from fedlab.run.launch.environment import flower_environment
from fedlab.run.launch.programs import program_file

ANSWER_SECONDS = 5.0
FLOWER_HOME, DATABASE, LOG = "flower", "superlink.db", "superlink.log"


@dataclass(frozen=True)
class Inner:
    """How programs on the coordinator's machine reach the SuperLink.

    Args:
        address: host:port, on loopback.
        keys: the coordinator's directory of keys.
    """

    address: str
    keys: Path

    @classmethod
    def of(cls, file: ServerFile) -> Inner:
        return cls(file.inner_address, file.keys)

    @classmethod
    def at(cls, address: str, keys: Path) -> Inner:
        """At an address that a person gave. Raises ConfigError unless it is on this machine and the keys are there."""
        try:
            host, _ = split_address(address)
        except ValueError as error:
            raise ConfigError(f"--server {error}") from None
        if not is_loopback(host):
            raise ConfigError(
                f"--server {address!r} is another machine, and a run is started beside its server; log in there, or"
                " forward server.inner_port (ssh -L 8444:127.0.0.1:8444) and give --server 127.0.0.1:8444"
            )
        for name in (CA, SECRET):
            if not (keys / name).is_file():
                raise ConfigError(f"{keys / name} is not there; give the server's directory of keys with --keys DIR")
        return cls(address, keys)

    @property
    def authority(self) -> bytes:
        return (self.keys / CA).read_bytes()

    @property
    def context(self) -> ssl.SSLContext:
        """Trusts the deployment's own authority and no other."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.authority.decode("ascii"))
        return context

    def control(self) -> ControlHttpClient:
        """A client of the control interface; it waits seconds, and asks once."""
        return ControlHttpClient(
            f"https://{self.address}",
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlab")],
            verify=self.context,
            timeout=ANSWER_SECONDS,
        )

    def answers(self) -> bool:
        """Whether the SuperLink is there and well."""
        try:
            return httpx.get(
                f"https://{self.address}/health", verify=self.context, timeout=2, trust_env=False
            ).is_success
        except httpx.HTTPError:
            return False


def superlink(file: ServerFile) -> Program:
    """The SuperLink of a server, with TLS, node keys, a secret for executors, and no app of its own process."""
    keys, state, inner = file.keys, file.state, Inner.of(file)
    command = [
        program_file("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(file.server.inner_port)),
        *("--ssl-ca-certfile", str(keys / CA), "--ssl-certfile", str(keys / SERVER)),
        *("--ssl-keyfile", str(keys / SERVER_KEY)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(keys / SECRET)),
        *("--database", str(state / DATABASE), "--disable-runtime-dependency-installation"),
        *([] if file.server.insecure else ["--enable-supernode-auth"]),
    ]
    environment = flower_environment(state / FLOWER_HOME)
    return Program("flower-superlink", command, environment, state / LOG, ready=inner.answers)


def known_nodes(inner: Inner) -> dict[bytes, int]:
    """Public key → number of every node that is registered. Raises RunFailed if the SuperLink does not answer."""
    return {bytes(node.public_key): node.node_id for node in _nodes(inner) if not node.unregistered_at}


def live_nodes(inner: Inner) -> int:
    """How many nodes are connected now. Raises RunFailed if the SuperLink does not answer."""
    return sum(node.status == NodeStatus.ONLINE for node in _nodes(inner))


def _nodes(inner: Inner) -> Sequence[NodeInfo]:
    try:
        with inner.control() as control:
            return list(control.ListNodes(ListNodesRequest()).nodes_info)
    except httpx.HTTPError as error:
        raise RunFailed(f"the SuperLink at {inner.address} does not answer ({type(error).__name__})") from None


def register(inner: Inner, wanted: Collection[NodeKey]) -> tuple[list[str], int]:
    """Make the SuperLink know these nodes and no others.

    Returns:
        Names of those that are new, and how many were shut out.

    Raises:
        RunFailed: it does not answer.
    """
    known = known_nodes(inner)
    keys = {flower_bytes(key): key for key in wanted}
    new = [key for pem, key in keys.items() if pem not in known]
    old = [number for pem, number in known.items() if pem not in keys]
    try:
        with inner.control() as control:
            for key in new:
                control.RegisterNode(RegisterNodeRequest(public_key=flower_bytes(key), name=key.name))
            for number in old:
                control.UnregisterNode(UnregisterNodeRequest(node_id=number))
    except httpx.HTTPError as error:
        raise RunFailed(f"nodes could not be registered with the SuperLink at {inner.address}: {error}") from None
    return [key.name for key in new], len(old)


def flower_bytes(key: NodeKey) -> bytes:
    """A node's public key as Flower carries it."""
    return key.public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
