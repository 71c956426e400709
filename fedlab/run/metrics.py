"""What happens in a run, as lines of ``metrics.jsonl`` and, on request, TensorBoard event files.

One line per round and phase (``train``, ``evaluate``) and one per notable event (an excluded client, a lost node). Each
line is flushed as it is written, so a crash loses nothing that was announced.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from fedlab.errors import Unwritable
from fedlab.files import naming
from fedlab.run.directory import RunDirectory, jsonable

logger = logging.getLogger("fedlab")


class MetricsLog:
    """Append-only event log of one run.

    Warnings of the ``fedlab`` logger land in it too, and everything in ``log.txt``, once and nowhere else; so do
    Python's warnings of other libraries while it is open. Whoever wants lines elsewhere adds a handler to that logger.
    """

    def __init__(self, directory: RunDirectory, tensorboard: bool = False) -> None:
        self._path = directory.path / "metrics.jsonl"
        self._file = self._path.open("ab+", buffering=0)
        self._whole = _cut_torn_line(self._file)
        self._lock = threading.Lock()
        self.watchers: list[Callable[[Mapping[str, Any]], object]] = []  # each is called with every line
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory.path / "tensorboard"))
        self._handlers: list[logging.Handler] = [
            _LogFile(directory.path / "log.txt", encoding="utf-8", errors="backslashreplace"),
            _ToEvents(self),
        ]
        self._handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handlers[1].setLevel(logging.WARNING)
        for handler in self._handlers:
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        self._propagated, logger.propagate = logger.propagate, False  # or any root handler says each line again
        self._foreign = _ForeignWarnings(self._handlers[0])

    def write(self, phase: str, round_number: int, **values: Any) -> None:
        """Append one line; numbers and named scores go to TensorBoard as ``<phase>/<name>``."""
        line = jsonable({"round": round_number, "phase": phase, "time": round(time.time(), 3), **values})
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with self._lock, naming(self._path):
            try:
                if (written := self._file.write(data)) != len(data):
                    raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes written")
            except OSError:
                self._file.truncate(self._whole)  # half a line would spoil the next
                raise
            self._whole += len(data)
        for watcher in self.watchers:
            watcher(line)
        if self._tensorboard is not None:
            named = {**line, **(line.get("scores") or {}), **(line.get("client_scores") or {})}
            for name, value in named.items():
                if isinstance(value, int | float) and name not in ("round", "time"):
                    self._tensorboard.add_scalar(f"{phase}/{name}", value, round_number)

    def close(self) -> None:
        """Flush and let go of every file; a second time nothing."""
        self._foreign.restore()
        logger.propagate = self._propagated
        for handler in self._handlers:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk: what was to be said of it is said
                handler.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class _ToEvents(logging.Handler):
    def __init__(self, events: MetricsLog) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, Unwritable):  # whoever logs is not to fail by it; the next round's line is
            self._events.write(
                "event", getattr(record, "round", 0), level=record.levelname.lower(), message=record.getMessage()
            )


class _LogFile(logging.FileHandler):
    """``log.txt``; on a full disk it is silent instead of printing tracebacks to the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: what writes the run's other files fails by itself."""


class _ForeignWarnings:
    """Sends Python's warnings, of whatever library, to a run's log while it is open, and nowhere else."""

    def __init__(self, handler: logging.Handler) -> None:
        self._logger, self._handler = logging.getLogger("py.warnings"), handler
        self._before = (self._logger.propagate, warnings.showwarning)
        self._logger.addHandler(handler)
        self._logger.propagate = False
        logging.captureWarnings(True)
        self._ours = warnings.showwarning

    def restore(self) -> None:
        """Let warnings go where they went before."""
        self._logger.removeHandler(self._handler)
        self._logger.propagate = self._before[0]
        if warnings.showwarning is self._ours and self._before[1] is not self._ours:
            logging.captureWarnings(False)


def _cut_torn_line(file: BinaryIO) -> int:
    """Remove a last line that a crash cut off. Returns the length of the rest."""
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    return whole
