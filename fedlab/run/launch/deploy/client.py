"""``fedlab client``: the resident trainer, and what carries bytes to it, kept running until ended.

The SuperNode, Flower's program, speaks to the server and holds the node's key. The carrier passes the messages on; it
runs no app of the server's, and is confined to Python, its own directory and the trainer's socket (``confine``; under
``client.transport_user`` it is another user besides). Only the trainer opens data, models and the ledger.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import fedlab
from fedlab.config.client import ClientFile
from fedlab.errors import ConfigError, FedlabError, RunFailed
from fedlab.files import write
from fedlab.run import interrupt
from fedlab.run.launch.deploy import carrier, confine, keys
from fedlab.run.launch.deploy.processes import Program, Supervisor
from fedlab.run.launch.deploy.reach import check_server_certificate
from fedlab.run.launch.environment import flower_environment
from fedlab.run.launch.programs import program_file
from fedlab.run.monitor.endpoints import CLIENT_FILE, client_endpoint
from fedlab.run.monitor.logs import configure, tell
from fedlab.run.output import complain, say

CONFINE = Path(confine.__file__)
SYSTEM = (
    *("/usr", "/lib", "/lib64", "/bin", "/etc", "/sys/fs/cgroup", "/sys/devices/system"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/filesystems"),  # nobody else's
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
LISTENS = "the trainer listens at"  # what ``clients.serve`` says
NOT_LET_IN = "the server does not let this node in"  # what the front answers, and a SuperNode prints
WATCH_SECONDS = 1.0
INSECURE = (
    "insecure: no TLS and no node key. Whoever sees the traffic can read and change what this client sends, and"
    " anybody can pretend to be the server. For tests on networks of your own only"
)


def check(file: ClientFile, only: str | None = None) -> list[str]:
    """What there is to warn of before a client starts. Raises ConfigError if it cannot."""
    warnings: list[str] = []
    if only == "trainer":
        return warnings
    if file.client.server is None:
        raise ConfigError("client.server is missing: host:port of the server, as the coordinator gave it")
    if file.client.insecure:
        warnings.append(INSECURE)
    elif file.client.ca is None or file.client.key is None:
        raise ConfigError(
            "client.ca and client.key are needed: the server's ca.crt from the coordinator, and the key that fedlab"
            f" keys node {file.client.id} made here; or client.insecure = true, on networks of your own"
        )
    else:
        warnings += keys.check_client(Path(file.client.ca), Path(file.client.key))
    return warnings


def _make_home(home: Path) -> None:
    """Raises ConfigError where it can be neither made nor written to."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        problem = error.strerror
    else:
        if os.access(home, os.W_OK | os.X_OK):
            return
        problem = "this user may not write there"
    raise ConfigError(
        f"client.home = {str(home)!r} cannot be used ({problem}); it keeps the ledger: name a directory of this user's"
    )


def serve(path: Path, only: str | None = None, ready: Callable[[], object] = lambda: None) -> None:
    """Run a client until it is interrupted, which is how it ends.

    Args:
        path: the client's file.
        only: "trainer" or "transport": the other runs elsewhere, and shares the socket.
        ready: called once its programs run.

    Raises:
        ConfigError: file, keys or certificates cannot be used.
        RunFailed: a part of it does not start.
    """
    file = ClientFile.load(path)
    configure(file.log.format)
    for warning in check(file, only):
        complain(f"fedlab: warning: {warning}")
    if only != "trainer" and not file.client.insecure:
        _look_at_server(file)
    _make_home(file.home)
    programs = [
        *([trainer(file, path)] if only != "transport" else []),
        *(transport(file) if only != "trainer" else []),
    ]
    with contextlib.suppress(KeyboardInterrupt), Supervisor(programs) as running:

        def restarts() -> Mapping[str, object]:
            return {"restarts": {child.program.name: max(0, child.starts - 1) for child in running.children}}

        snapshot = file.socket.with_name(CLIENT_FILE)
        # of two that share a socket, it is the transport's: a trainer in a container has no network
        address = None if only == "trainer" else file.metrics.address
        with client_endpoint(address, snapshot, restarts, file.metrics.exposed):
            does = (
                f"the trainer listens at {file.socket}" if only == "trainer" else f"it works for {file.client.server}"
            )
            tell(f"fedlab client: {file.client.id} is ready, {does}")
            ready()
            while True:
                running.watch(WATCH_SECONDS)
                interrupt.check()
    tell("stopped")


def trainer(file: ClientFile, path: Path) -> Program:
    """The resident trainer: this Python's own package, with this process's environment.

    It is ready when it has said so, and that was passed on: what is said later comes later.
    """
    listens = threading.Event()

    def heard(line: str) -> None:
        say(line)
        if LISTENS in line:
            listens.set()

    def hopeless(code: int, lines: Sequence[str]) -> FedlabError | None:
        told = [line for line in lines if line.startswith("fedlab: error: ")]
        return ConfigError(told[-1].removeprefix("fedlab: error: ")) if code == ConfigError.exit_code and told else None

    command = [sys.executable, "-m", "clients.serve", str(path.absolute())]
    log = file.home / "logs" / "trainer.log"
    return Program("trainer", command, dict(os.environ), log, ready=listens.is_set, on_line=heard, hopeless=hopeless)


def transport(file: ClientFile) -> list[Program]:
    """The SuperNode, and the carrier, which finds the trainer's socket and nothing else."""
    port, place = _free_port(), _transport_place(file)
    secret = place / "carrier.secret"
    write(secret, secrets.token_bytes(32), mode=0o600)
    flower = place / "flower"
    flower.mkdir(exist_ok=True, mode=0o700)
    if (user := _other_user(file)) is not None:
        for path in (secret, flower):
            shutil.chown(path, user)
    logs = file.home / "logs"
    return [_supernode(file, port, secret, logs), _carrier(file, port, secret, place, logs)]


def _supernode(file: ClientFile, port: int, secret: Path, logs: Path) -> Program:
    section = file.client
    secured = ["--root-certificates", str(section.ca), "--auth-supernode-private-key", str(section.key)]
    command = [
        program_file("flower-supernode"),
        *("--superlink", str(section.server)),
        *(["--insecure"] if section.insecure else secured),
        *("--isolation", "process", "--host", "127.0.0.1", "--port", str(port)),
        *("--superexec-auth-secret-file", str(secret)),
    ]

    def told(line: str) -> None:
        if NOT_LET_IN in line:  # it is tried again: the coordinator may let it in any time
            complain(
                f"fedlab: warning: {section.server} does not know this node's key; give the public key beside"
                f" {section.key} to the coordinator (fedlab keys add)"
            )

    return Program(
        "flower-supernode",
        command,
        flower_environment(file.home / "supernode"),
        logs / "supernode.log",
        ready=lambda: _answers(port),
        on_line=told,
    )


def _carrier(file: ClientFile, port: int, secret: Path, place: Path, logs: Path) -> Program:
    flower = place / "flower"
    command = [sys.executable, "-m", carrier.__name__, f"127.0.0.1:{port}", str(secret), str(file.socket)]
    if confine.version() >= 1:
        command = [sys.executable, "-I", "-S", str(CONFINE), json.dumps(allowances(flower, secret)), *command]
    environment = flower_environment(flower, {"HOME": str(flower), "TMPDIR": str(flower)})
    return Program("carrier", command, environment, logs / "carrier.log", user=_other_user(file))


def allowances(flower: Path, secret: Path) -> dict[str, list[str]]:
    """What the carrier may open: Python, the installed packages, its own directory to write."""
    roots = [entry for entry in sys.path if entry and Path(entry).is_dir()]
    installed = [entry for entry in roots if Path(entry).name in ("site-packages", "dist-packages")]
    own = Path(fedlab.__file__).parents[1]
    packages = [str(own / name) for name in ("fedlab", "clients", "strategies")]
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, str(Path(sys.executable).resolve().parents[1])]
    return {
        "read": [*SYSTEM, *DEVICES, *python, *installed, *packages, str(secret)],
        "list": roots,  # what imports look through; no file in them
        "write": [str(flower), "/dev/null"],
    }


def _transport_place(file: ClientFile) -> Path:
    """The directory of what carries bytes, which its user can pass through; owned by who starts the client."""
    place = file.home / "transport"
    user = _other_user(file)
    if user is not None:
        if os.geteuid() != 0:
            raise ConfigError(
                "client.transport_user needs root, to start a program as another user; start fedlab client as root, or"
                " leave it out"
            )
        place = file.socket.parent / "transport"
        if file.socket.parent == file.home:
            raise ConfigError(
                "client.transport_user needs client.socket outside client.home, where that user cannot look; for"
                f" example /run/fedlab-{file.client.id}/trainer.sock"
            )
        file.socket.parent.mkdir(parents=True, exist_ok=True)
        file.socket.parent.chmod(0o711)
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o711 if user is not None else 0o700)
    return place


def _other_user(file: ClientFile) -> int | None:
    """The user that Flower's executor is started as; None where that is the one who starts it, as in containers.

    Raises ConfigError if there is none of that name.
    """
    user = file.transport_user
    return None if user == os.geteuid() else user


def _look_at_server(file: ClientFile) -> None:
    """Say what is wrong with the server's certificate; a server that is not there yet may come later."""
    assert file.client.server is not None
    assert file.client.ca is not None
    try:
        for warning in check_server_certificate(file.client.server, Path(file.client.ca)):
            complain(f"fedlab: warning: {warning}")
    except RunFailed as error:
        complain(f"fedlab: warning: {error}; it is tried again until it does")


def _answers(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
