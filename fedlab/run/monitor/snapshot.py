"""A small file in which one process says how it is, and from which another one reads it.

The round loop is in ``fedlab run`` and the model in a client's trainer, which may have no network; the endpoint is in
the process that supervises. A lock beside the file tells whether its writer is still there, also after a SIGKILL.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlab.errors import Unwritable
from fedlab.files import replacing

PATIENCE = 1.0  # seconds in which a reader that is looking at the lock lets go of it
MODE, SHARED = 0o600, 0o644


@dataclass(frozen=True)
class Snapshot:
    """What was last written, and whether who wrote it is still there."""

    values: Mapping[str, Any]
    alive: bool


class SnapshotFile:
    """The writer's side. Nothing here raises: what is seen from outside must not end what is done inside.

    Args:
        path: the file; made with its folder, for its owner's eyes.
        shared: others may read it too, as far as its folder lets them; whatever the umask.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        self._path, self._mode = path, SHARED if shared else MODE
        self._lock: int | None = None
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _locked(_beside(path), self._mode)

    @property
    def held(self) -> bool:
        """Whether this is the one that writes; False where another process does, or no file can be made."""
        return self._lock is not None

    def write(self, values: Mapping[str, Any]) -> None:
        """Replace what is there."""
        if self._lock is not None:
            with contextlib.suppress(OSError, Unwritable), replacing(self._path) as temporary:
                temporary.touch(MODE)
                temporary.write_text(json.dumps(values), encoding="utf-8")
                temporary.chmod(self._mode)

    def close(self) -> None:
        """Let go of the file, which stays; from now on its writer is gone."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read(path: Path) -> Snapshot | None:
    """What is in the file; None if there is none, or it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Snapshot(values, _is_locked(_beside(path))) if isinstance(values, dict) else None


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _locked(path: Path, mode: int) -> int | None:
    """A descriptor that holds the lock; None if another process keeps it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, MODE)
    os.fchmod(descriptor, mode)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                return None
            time.sleep(0.02)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
