"""What the tests of a deployment share: free ports, and a server of real processes on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedlab.config.server import ServerFile
from fedlab.privacy.accounting import epsilon
from fedlab.privacy.audit.run import audit_run
from fedlab.privacy.ledger.ledger import events, parse_lines
from fedlab.run.directory import RunDirectory
from fedlab.run.launch.deploy import keys
from fedlab.run.launch.environment import QUIET_ENVIRONMENT, flower_environment
from fedlab.run.regenerate import regenerate

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


OWN_FILE = """
[client]
id = "{name}"
server = "{server}"
ca = "{ca}"
key = "{key}"
home = "{home}"
[data]
path = "{data}"
text = "text"
label = "topic"
[models."{model}"]
[policy]
min_sigma = 0.5
max_epsilon = 3000.0
[budget]
epsilon = 9000.0
"""
LABELS = ["fruit", "metal", "ocean"]


class House:
    """A server, clients with a third of the data each, and runs: processes that a test may do anything to."""

    def __init__(self, folder: Path, model: Path, data: Path, toml: str, host: str = "127.0.0.1") -> None:
        self.folder, self.model, self.host = folder, model, host
        self.lines = data.read_text(encoding="utf-8").splitlines()
        outer, inner = free_ports(2)
        self.address = f"{host}:{outer}"
        keys.init(folder / "keys", ["localhost", *([] if host == "127.0.0.1" else [host])])
        text = f'[server]\naddress = "{self.address}"\ninner_port = {inner}\n[rounds]\nwait = 240\n'
        (folder / "server.toml").write_text(text, encoding="utf-8")
        (folder / "run.toml").write_text(toml, encoding="utf-8")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.live: LiveServer | None = None
        self.runs: list[subprocess.Popen[bytes]] = []

    def serve(self) -> None:
        """Start the server, or start it again."""
        self.live = start_server(self.folder)
        self.processes["server"] = self.live.process  # type: ignore[assignment]

    def join(
        self,
        name: str,
        number: int,
        let_in: bool = True,
        home: Path | None = None,
        before: tuple[str, ...] = (),
        policy: str = "",
        more: str = "",
    ) -> None:
        """Make a client's keys and files, and start it.

        ``before``: what its command begins with. ``policy``, ``more``: what stands in its file beside the rest.
        """
        private, public = keys.make_node(name, self.folder)
        if let_in:
            keys.add_node(self.folder / "keys", public)
        data = self.folder / f"{name}.jsonl"
        data.write_text("\n".join(self.lines[number::3]) + "\n", encoding="utf-8")
        text = OWN_FILE.format(
            name=name,
            server=self.address if self.host != "127.0.0.1" else self.address.replace("127.0.0.1", "localhost"),
            ca=self.folder / "keys" / "ca.crt",
            key=private,
            home=home or self.folder / name,
            data=data,
            model=self.model,
        )
        text = text.replace("[policy]\n", f"[policy]\n{policy}\n") + f"\n{more}\n"
        (self.folder / f"{name}.toml").write_text(text, encoding="utf-8")
        self.start(name, before)

    def start(self, name: str, before: tuple[str, ...] = ()) -> None:
        """Start a client, and wait until it says that it is ready."""
        seen = self.said(name).count("is ready")
        self.processes[name] = self.begin(name, *before, sys.executable, "-m", "fedlab.cli", "client", f"{name}.toml")
        process = self.processes[name]
        wait_for(lambda: self.said(name).count("is ready") > seen or process.poll() is not None, 120, f"{name} ready")
        assert process.poll() is None, self.said(name)

    def begin(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with self.output(name).open("ab") as out:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environment(self.folder / f"flower-{name}"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )

    def run(self, *settings: str, out: str = "out") -> subprocess.Popen[bytes]:
        """Start a run; its output goes into the file of its name."""
        given = ["run.min_clients=1", "privacy.noise=secure", "evaluate.clients=never"]
        given += [f"data.clients={len(self.processes) - 1}", f"objective.labels={json.dumps(LABELS)}", *settings]
        words = [word for one in given for word in ("--set", one)]
        command = [
            sys.executable,
            "-m",
            "fedlab.cli",
            "run",
            "run.toml",
            "--server",
            "server.toml",
            "--out",
            out,
            *words,
        ]
        self.runs.append(self.begin(out, *command))
        return self.runs[-1]

    def end_runs(self) -> None:
        """After a test that failed, a run may be left."""
        for process in self.runs:
            if process.poll() is None:
                process.kill()
                process.wait()

    def fedlab(self, *words: str, out: str = "out") -> int:
        """Run a command to its end; its exit code."""
        return self.begin(out, sys.executable, "-m", "fedlab.cli", *words).wait(280)

    def output(self, name: str) -> Path:
        """Where what a command says goes."""
        return self.folder / f"{name.replace('/', '-')}.out"

    def said(self, name: str) -> str:
        path = self.output(name)
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def part(self, name: str, what: str) -> int:
        """Process of a part: clients.serve, flower-supernode, carrier, flower-superlink."""
        top = self.processes[name].pid
        pids = [int(pid) for pid in Path(f"/proc/{top}/task/{top}/children").read_text().split()]
        return next(pid for pid in pids if what.encode() in Path(f"/proc/{pid}/cmdline").read_bytes())

    def ledger(self, name: str, home: Path | None = None) -> list[dict[str, Any]]:
        path = (home or self.folder / name) / "ledger" / f"{name}.jsonl"
        return parse_lines(path.read_text()) if path.is_file() else []

    def rounds(self, out: str = "out") -> list[dict[str, Any]]:
        """Lines of the rounds that are complete."""
        path = self.folder / out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [line for line in map(json.loads, lines) if line["phase"] == "train"]

    def in_training(self, name: str, number: int) -> None:
        """Wait until a client has charged a round and not committed it."""

        def charged() -> bool:
            lines = self.ledger(name)
            return bool(lines) and lines[-1]["type"] == "CHARGE" and lines[-1]["round"] == number

        wait_for(charged, 400, f"{name} training in round {number}")

    def check(self, out: str = "out", homes: Mapping[str, Path] | None = None) -> dict[str, Any]:
        """The result; the audit finds nothing, and nobody spent more than the run says."""
        path = self.folder / out
        result: dict[str, Any] = json.loads((path / "result.json").read_text(encoding="utf-8"))
        audit = audit_run(path, regenerate=regenerate)
        assert audit.findings == ()
        assert audit.verdict == ("consistent" if result["status"] == "completed" else "incomplete")
        run = RunDirectory.open(path).run_id
        for name in [name for name in self.processes if name != "server"]:
            spent = events(self.ledger(name, (homes or {}).get(name)), run)
            claimed = result["clients"].get(name, {"epsilon": 0.0, "delta": 1e-5})
            assert claimed["epsilon"] >= epsilon(spent, claimed["delta"]) - 1e-9, name
        return result

    def close(self) -> None:
        self.end_runs()
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def houses() -> Iterator[dict[str, House]]:
    """The house of this module, once it is made."""
    made: dict[str, House] = {}
    yield made
    for house in made.values():
        house.close()
