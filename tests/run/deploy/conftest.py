"""What the tests of a deployment share: free ports, and a server of real processes on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedlab.config.server import ServerFile
from fedlab.run.launch.deploy import keys
from fedlab.run.launch.environment import QUIET_ENVIRONMENT, flower_environment

ROOT = Path(__file__).resolve().parents[3]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0, what: str = "it") -> float:
    """Wait until something is true; the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


@dataclass
class LiveServer:
    """A running ``fedlab server``."""

    folder: Path
    process: subprocess.Popen[str]
    beside: list[subprocess.Popen[str]] = field(default_factory=list)  # what tests started in its folder

    @property
    def file(self) -> ServerFile:
        return ServerFile.load(self.folder / "server.toml")

    @property
    def address(self) -> str:
        return self.file.server.address

    @property
    def output(self) -> str:
        return (self.folder / "server.out").read_text(encoding="utf-8")

    def superlink(self) -> int:
        """The SuperLink's process; 0 while there is none."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        return int(found[0]) if found else 0

    def stop(self) -> int:
        for one in self.beside:
            if one.poll() is None:
                one.kill()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, **QUIET_ENVIRONMENT, "FLWR_HOME": str(home), "PYTHONPATH": str(ROOT)}


def start_server(folder: Path) -> LiveServer:
    """Start ``fedlab server`` with the file in a folder, and wait until it says that it is ready."""
    with (folder / "server.out").open("a", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedlab.cli", "server", str(folder / "server.toml")],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(folder / "home"),
            text=True,
        )
    live = LiveServer(folder, process)
    before = live.output.count("ready on")
    try:
        wait_for(lambda: live.output.count("ready on") > before or process.poll() is not None, 60, "a ready server")
        assert process.poll() is None, live.output
    except BaseException:
        process.kill()
        raise
    return live


def make_folder(folder: Path) -> Path:
    """Keys for a server and for a client ``north``, who is let in, and a ``server.toml``."""
    outer, inner = free_ports(2)
    keys.init(folder / "keys", ["localhost"])
    keys.add_node(folder / "keys", keys.make_node("north", folder)[1])
    (folder / "server.toml").write_text(
        f'[server]\naddress = "127.0.0.1:{outer}"\ninner_port = {inner}\n', encoding="utf-8"
    )
    return folder


ECHO = """
import os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
@app.train()
def answer(message, context):
    asked = dict(message.content.config_records["fedlab"])
    time.sleep(asked.get("seconds", 0))
    reply = ConfigRecord({"said": asked["said"], "node": context.node_config["name"], "pid": os.getpid()})
    return Message(RecordDict({"fedlab": reply}), reply_to=message)
"""


def flower_program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


ECHO_APP = "fedlab_echo:app"


class Nodes:
    """Flower's own SuperNodes, and executors whose app answers what it was asked."""

    def __init__(self, live: LiveServer, folder: Path) -> None:
        self.live, self.folder = live, folder
        self.processes: dict[str, list[subprocess.Popen[bytes]]] = {}
        (folder / "apps").mkdir(exist_ok=True)
        (folder / "apps" / "fedlab_echo.py").write_text(ECHO, encoding="utf-8")

    def start(self, name: str, key: Path, flower: bool = False) -> None:
        """A node and its executor; ``flower``: Flower's own, which runs what a bundle names."""
        port = free_ports(1)[0]
        ca = str(self.live.file.keys / "ca.crt")
        secret = self.folder / f"{name}.secret"
        secret.write_bytes(os.urandom(32))
        common = ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        node = ["--superlink", self.live.address, "--root-certificates", ca, "--auth-supernode-private-key", str(key)]
        config = ["--node-config", f'name="{name}"', "--host", "127.0.0.1", "--port", str(port)]
        carrier = [sys.executable, "-m", "fedlab.run.launch.deploy.carrier", f"127.0.0.1:{port}", str(secret), ECHO_APP]
        executor = [flower_program("flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
        executor += common[2:]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = [
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment(home))
                for command, home in (
                    ([flower_program("flower-supernode"), *node, *common, *config], f"{name}-node"),
                    (executor if flower else carrier, f"{name}-exec"),
                )
            ]

    def environment(self, home: str) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder / "apps"), str(ROOT)])
        return flower_environment(self.folder / home, {"PYTHONPATH": path, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"})

    def stop(self) -> None:
        for process in [one for both in self.processes.values() for one in reversed(both)]:
            process.terminate()
        for process in [one for both in self.processes.values() for one in both]:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def nodes(live: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """One node, ``north``, of the live server."""
    found = Nodes(live, tmp_path_factory.mktemp("nodes"))
    found.start("north", live.folder / "north.key")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server of real processes, with one client's key let in."""
    found = start_server(make_folder(tmp_path_factory.mktemp("server")))
    yield found
    if found.process.poll() is None:
        found.stop()
