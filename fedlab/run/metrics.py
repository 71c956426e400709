"""What happens in a run, as lines of ``metrics.jsonl`` and, on request, TensorBoard event files.

One line per round and phase (``train``, ``evaluate``) and one per notable event (an excluded client, a lost node). Each
line is flushed as it is written, so a crash loses nothing that was announced.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any

from fedlab.run.directory import RunDirectory, jsonable

logger = logging.getLogger("fedlab")


class MetricsLog:
    """Append-only event log of one run.

    Warnings of the ``fedlab`` logger land in it too, and everything in ``log.txt``.
    """

    def __init__(self, directory: RunDirectory, tensorboard: bool = False) -> None:
        self._file = (directory.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory.path / "tensorboard"))
        self._handlers: list[logging.Handler] = [
            logging.FileHandler(directory.path / "log.txt", encoding="utf-8"),
            _ToEvents(self),
        ]
        self._handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handlers[1].setLevel(logging.WARNING)
        for handler in self._handlers:
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)

    def write(self, phase: str, round_number: int, **values: Any) -> None:
        """Append one line; numbers and named scores go to TensorBoard as ``<phase>/<name>``."""
        line = jsonable({"round": round_number, "phase": phase, "time": round(time.time(), 3), **values})
        with self._lock:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            named = {**line, **(line.get("scores") or {}), **(line.get("client_scores") or {})}
            for name, value in named.items():
                if isinstance(value, int | float) and name not in ("round", "time"):
                    self._tensorboard.add_scalar(f"{phase}/{name}", value, round_number)

    def close(self) -> None:
        """Flush and let go of every file."""
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


class _ToEvents(logging.Handler):
    def __init__(self, events: MetricsLog) -> None:
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        self._events.write(
            "event", getattr(record, "round", 0), level=record.levelname.lower(), message=record.getMessage()
        )
