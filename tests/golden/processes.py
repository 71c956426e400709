"""Processes that run configurations of a tree: started, asked, interrupted, ended."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cases import Case

HERE = Path(__file__).resolve().parent
CASE_SECONDS = 300.0  # after which a run counts as hanging


class Worker:
    """One process that runs configurations of one tree. Use as a context manager."""

    def __init__(self, tree: Path, work: Path, number: int) -> None:
        self.tree, self.work, self.number = tree.resolve(), work, number
        self._log = (work / f"tree-{number}.log").open("a", encoding="utf-8")
        self._process: subprocess.Popen[str] | None = None
        self._other: subprocess.Popen[str] | None = None  # in which runs are cut off

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._log.close()

    def start(self) -> subprocess.Popen[str]:
        """A fresh process on the tree, with a cache of the tree's own."""
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        quiet |= {"OMP_WAIT_POLICY": "PASSIVE"}  # evaluation uses all cores; threads that spin take them from others
        own = {"PYTHONPATH": str(self.tree), "FEDLAB_CACHE": str(self.work / f"cache-{self.number}")}
        return subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(self.tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=self.work,
            env={**os.environ, **quiet, **own, "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. A process that hangs or dies is an error, and the next request gets a new one."""
        if self._process is None:
            self._process = self.start()
        send(self._process, request)
        if line := next_line(self._process):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.stop(kill=True)
        return {"seconds": CASE_SECONDS, "error": f"the process died or hung; see {self._log.name}"}

    def cut_off(self, request: dict[str, Any], case: Case) -> str:
        """Begin a run in another process and stop it after a checkpoint. Returns why that failed, if it did.

        A run that was interrupted leaves its process alive for the next one to begin in; nothing is resumed there.
        """
        process, out = self._other or self.start(), Path(request["out"])
        self._other = process
        send(process, request)
        end = time.monotonic() + CASE_SECONDS
        while len(list(out.rglob("checkpoints/*.json"))) < case.begun and time.monotonic() < end:
            if process.poll() is not None:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGINT if case.way == "interrupt" else signal.SIGKILL)
        line = next_line(process)
        if not line:
            end_process(process, kill=True)
            self._other = None
        over = bool(line) and not json.loads(line)["error"]
        return "the run was over before it could be cut off" if over else ""

    def stop(self, kill: bool = False) -> None:
        """End the processes."""
        for process in (self._process, self._other):
            if process is not None:
                end_process(process, kill)
        self._process = self._other = None


def next_line(process: subprocess.Popen[str]) -> str:
    """The next line that a process writes; empty if it dies or hangs."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], CASE_SECONDS)
    return str(process.stdout.readline()) if ready else ""


def end_process(process: subprocess.Popen[str], kill: bool) -> None:
    """End a process, by force or by ending its input."""
    if kill:
        process.kill()
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def send(process: subprocess.Popen[str], request: dict[str, Any]) -> None:
    """Write one request."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
