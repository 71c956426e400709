"""Programs that are started, watched, started again when they end, and stopped together.

One thread, the one that starts a supervisor, does all of that: the kernel ends a child when the *thread* that started
it ends (``guard``). Another thread per program only copies its output into its log, which is bounded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from fedlab.errors import FedlabError, RunFailed

GUARD = Path(__file__).with_name("guard.py")
READY_SECONDS = 240.0  # for a program to answer for the first time: a cold disk under a busy machine takes minutes
STEADY_SECONDS = 60.0  # whoever lived that long is started again at once
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # before it is started for the second time, the third, …
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
LOG_BYTES, LOG_FILES = 10 * 2**20, 3
LINE_BYTES = 64 * 1024
TAIL = 15  # lines of a program's output that are told when it fails
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
logger = logging.getLogger("fedlab")


@dataclass(frozen=True)
class Program:
    """A program to keep running.

    Args:
        name: what people call it.
        command: file and arguments.
        environment: all of it; nothing is added.
        log: where its output goes.
        ready: whether it does its work; default: as soon as it runs.
        on_line: called with each line of its output, in another thread.
        hopeless: exit code and last lines of output → the error to raise where another start cannot help, else None.
        user: whom it runs as, by number, with that user's group alone; default: as this process.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    ready: Callable[[], bool] | None = None
    on_line: Callable[[str], object] | None = None
    hopeless: Callable[[int, Sequence[str]], FedlabError | None] = lambda code, lines: None
    user: int | None = None


@dataclass
class Child:
    """A program's process as it is now."""

    program: Program
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0  # by the monotonic clock
    failures: int = 0  # since it last lived long
    next_start: float = 0.0
    starts: int = 0
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    copier: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def told(self) -> str:
        """Its last lines, indented."""
        return "".join(f"\n  {line}" for line in self.lines)


class Supervisor:
    """Programs that run as long as it is open. Not to be shared between threads."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.children = [Child(program) for program in programs]
        self._changed = threading.Event()

    def __enter__(self) -> Supervisor:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all, in order, each once the one before it is ready. Raises RunFailed if one ends, or never is."""
        for child in self.children:
            self._start(child)
            deadline = time.monotonic() + READY_SECONDS
            while child.program.ready is not None and not child.program.ready():
                if not child.alive:
                    self._raise_ended(child)
                if time.monotonic() > deadline:
                    raise RunFailed(
                        f"{child.program.name} did not answer within {READY_SECONDS:.0f} s; see {child.program.log}"
                        + child.told
                    )
                self._changed.wait(0.05)
                self._changed.clear()

    def watch(self, seconds: float) -> None:
        """Look after the programs for so long: what has ended is started again, later each time.

        Raises what ``hopeless`` returns.
        """
        until = time.monotonic() + seconds
        while True:
            for child in self.children:
                self._look(child)
            left = until - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(min(left, 0.5))
            self._changed.clear()

    def restart(self) -> None:
        """End all and start them again at the next ``watch``: for what they read when they start."""
        for child in self.children:
            if child.process is not None:
                _end(child.process)
                child.process, child.next_start = None, 0.0

    def stop(self) -> None:
        """End all, the last started first: SIGTERM, then SIGKILL for what stays, and for all that they started."""
        for child in reversed(self.children):
            if child.process is not None:
                _end(child.process)
        for child in self.children:
            if child.copier is not None:
                child.copier.join(2)

    def _start(self, child: Child) -> None:
        program = child.program
        program.log.parent.mkdir(parents=True, exist_ok=True)
        child.lines.clear()
        child.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD), str(os.getpid()), *program.command],
            env=dict(program.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            umask=0o077,
            start_new_session=True,  # Ctrl-C is for the supervisor, which stops them in order
            **_identity(program.user),
        )
        child.started, child.starts = time.monotonic(), child.starts + 1
        assert child.process.stdout is not None
        child.copier = threading.Thread(
            target=_copy, args=(child.process.stdout, child, self._changed), name=f"log of {program.name}", daemon=True
        )
        child.copier.start()

    def _look(self, child: Child) -> None:
        if child.alive:
            return
        now = time.monotonic()
        if child.process is not None:
            code = child.process.returncode
            _end(child.process)  # whatever it started and left behind
            child.process = None
            if child.copier is not None:
                child.copier.join(2)
            error = child.program.hopeless(code, list(child.lines))
            if error is not None:
                raise error
            child.failures = 0 if now - child.started > STEADY_SECONDS else child.failures
            delay = DELAYS[min(child.failures, len(DELAYS) - 1)]
            child.failures, child.next_start = child.failures + 1, now + delay
            logger.warning("%s %s; it starts again in %g s", child.program.name, ended(code), delay)
        if now >= child.next_start:
            self._start(child)

    def _raise_ended(self, child: Child) -> None:
        assert child.process is not None
        if child.copier is not None:
            child.copier.join(2)
        code = child.process.returncode
        error = child.program.hopeless(code, list(child.lines))
        raise error or RunFailed(f"{child.program.name} {ended(code)} before it was ready:{child.told}")


def _identity(user: int | None) -> dict[str, Any]:
    """Arguments for ``Popen`` that make a child another user."""
    if user is None:
        return {}
    entry = pwd.getpwuid(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def ended(code: int) -> str:
    """How a program ended, in words."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: what it started
    process.wait()


class _Log(RotatingFileHandler):
    """A log that no full disk can turn into an error."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line."""


def _copy(stream: IO[bytes], child: Child, changed: threading.Event) -> None:
    """Copy a program's output to its log until it ends. Whatever fails, the pipe is emptied, or the program stops."""
    log: _Log | None = None
    with contextlib.suppress(OSError):
        log = _Log(child.program.log, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
        child.program.log.chmod(0o600)
    while line := stream.readline(LINE_BYTES):
        text = _COLOUR.sub("", line.decode("utf-8", "replace")).rstrip()
        child.lines.append(text)
        if log is not None:
            log.emit(logging.makeLogRecord({"msg": "%s", "args": (text,)}))
        if child.program.on_line is not None:
            with contextlib.suppress(Exception):
                child.program.on_line(text)
    stream.close()
    if log is not None:
        log.close()
    changed.set()
