"""``fedlab server``: the SuperLink and the front, kept running until somebody ends them.

The SuperLink is a program of its own; the front runs in a thread of this process, so that what it knows (who is let in,
what was refused) needs no second channel. Where this process is killed, the SuperLink goes with it, and what starts
servers (systemd, a container engine) starts both again; runs that were under way go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from fedlab.config.server import ServerFile, is_loopback
from fedlab.errors import ConfigError, RunFailed
from fedlab.run import interrupt
from fedlab.run.launch.deploy import keys
from fedlab.run.launch.deploy.certificates import read_certificate
from fedlab.run.launch.deploy.front import Doorkeeper, Front
from fedlab.run.launch.deploy.processes import Supervisor
from fedlab.run.launch.deploy.superlink import Inner, live_nodes, register, superlink
from fedlab.run.monitor import logs
from fedlab.run.monitor.endpoints import RUN_FILE, server_endpoint
from fedlab.run.output import complain

NODES_SECONDS = 1.0  # between two looks at who is let in
AGAIN_SECONDS = 60.0  # nodes are registered again, in case that the SuperLink lost some
START_SECONDS = 20.0
MOST_CONNECTIONS = 1024
INSECURE = (
    "insecure: no TLS and no node keys. Whoever reaches {address} can take part in runs, and whoever sees the traffic"
    " can read and change what clients send. For tests on networks of your own only"
)
logger = logging.getLogger("fedlab")


def check(file: ServerFile) -> list[str]:
    """What there is to warn of before a server starts. Raises ConfigError if it cannot."""
    warnings = keys.check_server(file.keys)
    if file.server.insecure:
        warnings.append(INSECURE.format(address=file.server.address))
    return warnings


def serve(file: ServerFile, ready: Callable[[], object] = lambda: None) -> None:
    """Run a server until it is interrupted, which is how it ends.

    Args:
        file: the coordinator's.
        ready: called once clients can connect.

    Raises:
        ConfigError: keys, ports or directories cannot be used.
        RunFailed: a part of it does not start.
    """
    logs.configure(file.log.format)
    for warning in check(file):
        complain(f"fedlab: warning: {warning}")
    with _alone(file.state), _listening(file) as socket_, contextlib.suppress(KeyboardInterrupt):
        _check_free(file.server.inner_port)
        with Supervisor([superlink(file)]) as programs:
            doorkeeper = Doorkeeper()
            nodes = _Nodes(file, doorkeeper)
            nodes.look()
            with FrontThread(file, doorkeeper, socket_) as front, _endpoint(file, programs, nodes, front):
                logs.tell(_ready_line(file, nodes))
                ready()
                while True:
                    programs.watch(NODES_SECONDS)
                    interrupt.check()
                    nodes.look()
                    if front.look():
                        logs.tell("the certificate was renewed")
                        programs.restart()
    logs.tell("stopped")


class FrontThread:
    """The front of a server, serving in a thread; started again if it ends."""

    def __init__(self, file: ServerFile, doorkeeper: Doorkeeper, listening: socket.socket) -> None:
        inner, section = Inner.of(file), file.server
        checked = None if section.insecure else doorkeeper
        self.front = Front(f"https://{inner.address}", inner.context, checked, section.max_body * 2**20)
        self._tls = None if section.insecure else (file.keys / keys.SERVER, file.keys / keys.SERVER_KEY)
        self._listening = listening
        self._shown = 0.0  # when the certificate that is shown was written
        self._shown = self._written()
        self._start()

    def __enter__(self) -> FrontThread:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)
        self._server.force_exit = True
        self._thread.join(5)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def look(self) -> bool:
        """Start it again if it ended; show a certificate that was renewed meanwhile. Whether there was one."""
        if not self.alive:
            logger.warning("the front ended; it starts again")
            self._start()
        written = self._written()
        if self._tls is None or self._context is None or written == self._shown:
            return False
        try:
            self._context.load_cert_chain(*self._tls)
        except (OSError, ssl.SSLError) as error:  # half of a pair; the other half comes, or the old one stays
            logger.warning("the new certificate cannot be used (%s)", type(error).__name__)
            self._shown = written
            return False
        self._shown = written
        return True

    def _written(self) -> float:
        with contextlib.suppress(OSError):
            return max(path.stat().st_mtime for path in self._tls or ())
        return self._shown

    def _start(self) -> None:
        config = uvicorn.Config(
            self.front,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=3,
            limit_concurrency=MOST_CONNECTIONS,
            ws="none",
            ssl_certfile=self._tls[0] if self._tls else None,
            ssl_keyfile=self._tls[1] if self._tls else None,
        )
        config.load()
        self._context = config.ssl
        if self._context is not None:
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="front", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RunFailed("the front could not be started")
            time.sleep(0.02)

    def _serve(self) -> None:
        with contextlib.suppress(SystemExit):
            asyncio.run(self._server.serve(sockets=[self._listening.dup()]))


class _Nodes:
    """Who is let in: looks at ``nodes/`` and tells the front and the SuperLink what changed there."""

    def __init__(self, file: ServerFile, doorkeeper: Doorkeeper) -> None:
        self._inner, self._keys, self._doorkeeper = Inner.of(file), file.keys, doorkeeper
        self._insecure = file.server.insecure
        self._state: object = None
        self._registered = 0.0
        self._told: list[str] = []
        self.count = 0

    def look(self) -> None:
        """Tell what changed. What cannot be told now is told at the next look."""
        if self._insecure:
            return
        state = _state_of(self._keys / keys.NODES)
        if state == self._state and time.monotonic() - self._registered < AGAIN_SECONDS:
            return
        problems: list[str] = []
        found = keys.node_keys(self._keys, problems)  # one that cannot be read keeps nobody else in or out
        self._doorkeeper.let_in(found)
        try:
            new, gone = register(self._inner, found)
        except RunFailed as error:
            self._warn([str(error)])
            return
        self._warn(problems)
        for name in new if self._state is not None else ():
            logs.tell(f"let in: {name}", client=name)
        if gone and self._state is not None:
            logs.tell(f"shut out: {gone} node{'' if gone == 1 else 's'}")
        self._state, self._registered, self.count = state, time.monotonic(), len(found)

    def _warn(self, problems: list[str]) -> None:
        """Tell what is new of it."""
        for problem in problems:
            if problem not in self._told:
                logger.warning("%s", problem)
        self._told = problems


@contextlib.contextmanager
def _endpoint(file: ServerFile, programs: Supervisor, nodes: _Nodes, front: FrontThread) -> Iterator[None]:
    """What is seen of the server from outside, if its file asks for it."""
    inner, seen = Inner.of(file), front.front.seen

    def values() -> dict[str, object]:
        live: int | None = None
        with contextlib.suppress(RunFailed):  # then it is not known, and not shown
            live = live_nodes(inner)
        return {
            "nodes_live": live,
            "nodes_registered": nodes.count,
            "restarts": {child.program.name: max(0, child.starts - 1) for child in programs.children},
            "requests": {"passed": seen.requests, "refused": seen.refused},
            "bytes": {"up": seen.bytes_in, "down": seen.bytes_out},
            "certificate_expires": read_certificate(file.keys / keys.SERVER).until.timestamp(),
        }

    def problem() -> str | None:
        if not front.alive:
            return "the front is not running"
        return None if inner.answers() else "the SuperLink does not answer"

    with server_endpoint(file.metrics.address, file.state / RUN_FILE, values, problem, file.metrics.exposed):
        yield


def _state_of(directory: Path) -> object:
    try:
        return sorted((entry.name, entry.stat().st_mtime_ns, entry.stat().st_ino) for entry in os.scandir(directory))
    except OSError:
        return ()


def _ready_line(file: ServerFile, nodes: _Nodes) -> str:
    if file.server.insecure:
        return f"fedlab server: ready on {file.server.address}, without TLS and without node keys"
    until = read_certificate(file.keys / keys.SERVER).until
    known = f"{nodes.count} node{'' if nodes.count == 1 else 's'} let in"
    return f"fedlab server: ready on {file.server.address} (TLS, certificate until {until:%Y-%m-%d}), {known}"


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Hold the state's directory. Raises ConfigError if another server does."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"server.state = {str(state)!r} cannot be used: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"server.state = {str(state)!r} is in use by another server; stop that one, or give this its own state"
            ) from None
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _listening(file: ServerFile) -> Iterator[socket.socket]:
    """The front's socket, before anything is started. Raises ConfigError if it cannot be had."""
    host, port = file.server.host, file.server.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not is_loopback(host):
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] is IPv4 too
        made.bind(address)
        made.listen(1024)
    except OSError as error:
        raise ConfigError(
            f"server.address = {file.server.address!r}: {error.strerror or error}; take another, or end what is there"
        ) from None
    try:
        yield made
    finally:
        made.close()


def _check_free(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"server.inner_port = {port}: {error.strerror}; choose another port") from None
