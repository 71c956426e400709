"""Programs that are kept running: started again, stopped together, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlab.errors import ConfigError, RunFailed
from fedlab.run.launch.deploy import processes
from fedlab.run.launch.deploy.processes import Program, Supervisor
from fedlab.run.launch.environment import flower_environment

FOREVER = "import time\nprint('up', flush=True)\ntime.sleep(600)"


def python(name: str, text: str, folder: Path, **more: object) -> Program:
    return Program(name, [sys.executable, "-c", text], {"LANG": "C.UTF-8"}, folder / f"{name}.log", **more)  # type: ignore[arg-type]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_what_is_killed_starts_again_and_all_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "DELAYS", (0.05, 0.1))
    said: list[str] = []
    grandchild = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {FOREVER!r}])\n{FOREVER}"
    programs = [python("one", FOREVER, tmp_path, on_line=said.append), python("two", grandchild, tmp_path)]
    with Supervisor(programs) as supervisor:
        one, two = supervisor.children
        until(lambda: "up" in said)
        assert one.process is not None
        first = one.process.pid
        os.kill(first, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while one.starts < 2 and time.monotonic() < deadline:
            supervisor.watch(0.05)
        assert one.starts == 2
        assert one.process.pid != first
        assert two.process is not None
        group = two.process.pid
        until(lambda: (tmp_path / "two.log").read_text().count("up") == 2)
        mine = subprocess.run(["ps", "-o", "pid=", "-g", str(group)], capture_output=True, text=True).stdout.split()
        assert len(mine) == 2
    assert all(gone(int(pid)) for pid in [*mine, one.process.pid])
    assert (tmp_path / "one.log").stat().st_mode & 0o777 == 0o600


def test_delays_grow_and_are_forgotten_after_a_long_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "DELAYS", (0.0, 0.0, 9.0))
    with Supervisor([python("short", "raise SystemExit(3)", tmp_path)]) as supervisor:
        (child,) = supervisor.children
        until(lambda: supervisor.watch(0.05) or child.failures == 3)
        assert child.next_start - time.monotonic() > 5
        monkeypatch.setattr(processes, "STEADY_SECONDS", 0.0)
        child.next_start = 0.0
        until(lambda: supervisor.watch(0.05) or child.failures == 1)


def test_what_ends_before_it_is_ready_is_told_with_its_last_words(tmp_path: Path):
    text = "print('\\x1b[91mport in use\\x1b[0m')\nraise SystemExit(7)"
    with pytest.raises(RunFailed, match=r"one ended with code 7 before it was ready:\n  port in use"):
        Supervisor([python("one", text, tmp_path, ready=lambda: False)]).__enter__()


def test_what_cannot_be_helped_is_not_tried_again(tmp_path: Path):
    def hopeless(code: int, lines: object) -> ConfigError | None:
        return ConfigError("unknown key") if code == 9 else None

    with Supervisor([python("one", "raise SystemExit(9)", tmp_path, hopeless=hopeless)]) as supervisor:
        with pytest.raises(ConfigError, match="unknown key"):
            supervisor.watch(10)
        assert supervisor.children[0].starts == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_supervisor_leaves_nobody_behind(tmp_path: Path):
    text = f"""
import os, signal, sys
from pathlib import Path
from fedlab.run.launch.deploy.processes import Program, Supervisor
with Supervisor([Program("one", [sys.executable, "-c", {FOREVER!r}], {{}}, Path({str(tmp_path)!r}) / "log")]) as s:
    print(s.children[0].process.pid, flush=True)
    s.watch(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    until(lambda: (tmp_path / "log").exists() and "up" in (tmp_path / "log").read_text())
    parent.kill()
    parent.wait()
    until(lambda: gone(pid))


def test_a_program_gets_only_what_it_needs_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "intranet")
    found = flower_environment(tmp_path, {"MORE": "1"})
    assert "HF_TOKEN" not in found
    assert (found["FLWR_HOME"], found["MORE"], found["FLWR_TELEMETRY_ENABLED"]) == (str(tmp_path), "1", "0")
    assert found["NO_PROXY"] == "intranet,localhost,127.0.0.1,::1"
