"""A run as others see it: what the round loop reports anyway, kept in a snapshot that the server's endpoint reads.

``watched`` is the one call of the server's app; ``fedlab.run.monitor.endpoints`` shows what is in the file.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fedlab.config import RunConfig
from fedlab.errors import Interrupted
from fedlab.protocol.failures import SENTENCES
from fedlab.run.directory import RunDirectory
from fedlab.run.metrics import MetricsLog
from fedlab.run.monitor.endpoints import ENDED
from fedlab.run.monitor.logs import FIELDS
from fedlab.run.monitor.snapshot import SnapshotFile
from fedlab.run.progress import Progress, RoundLine

logger = logging.getLogger("fedlab")
MONITOR, JSON = "monitor", "log-json"  # keys of the app's run configuration: a path, a bool


def watched(
    progress: Progress,
    events: MetricsLog,
    directory: RunDirectory,
    settings: Mapping[str, Any],
    nodes: Callable[[], Iterable[object]],
) -> Progress:
    """The progress that a run reports to, seen from outside too where that is asked for.

    Args:
        progress: what people see.
        events: the run's log of events; it is listened to.
        directory: the run's.
        settings: run configuration of the app: ``monitor``, the snapshot's path, and ``log-json``; without them
            ``progress`` comes back as it is.
        nodes: gives the nodes that are connected.
    """
    if settings.get(JSON) and type(progress) is not Progress:  # the latter is what --quiet has
        progress = JsonProgress(directory.config)
    if not (path := str(settings.get(MONITOR) or "")):
        return progress
    return WatchedProgress(progress, events, directory, Path(path), nodes)


class WatchedProgress(Progress):
    """Passes all on, and keeps the snapshot up to date: at most a few times in a round, never by record or step."""

    def __init__(
        self,
        shown: Progress,
        events: MetricsLog,
        directory: RunDirectory,
        path: Path,
        nodes: Callable[[], Iterable[object]],
    ) -> None:
        self._shown, self._nodes, self._file = shown, nodes, SnapshotFile(path)
        self._values: dict[str, Any] = {
            "run": {directory.run_id: 1},
            "status": "starting",
            "rounds_planned": directory.config.run.rounds,
            "exclusions": dict.fromkeys((*SENTENCES, "other"), 0),
            "bytes": {"up": 0, "down": 0},
            "seconds": {"train": 0.0, "evaluate": 0.0, "overhead": 0.0},
            "events": {"warning": 0, "error": 0},
        }
        events.watchers.append(self._take)
        if not self._file.held:
            logger.warning("%s is another run's, or cannot be written: this run is not seen from outside", path)

    def __enter__(self) -> Progress:
        self._write()
        self._shown.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._values["status"] not in ENDED:
            by_hand = isinstance(error, KeyboardInterrupt | SystemExit | Interrupted)
            self._write(status="interrupted" if by_hand else "failed")
        self._file.close()
        self._shown.__exit__(kind, error, trace)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def remark(self, text: str) -> None:
        self._shown.remark(text)

    def round_started(self, number: int, clients: int) -> None:
        self._write(status="running", asked=clients, round_started=time.time(), nodes_live=_count(self._nodes))
        self._shown.round_started(number, clients)

    def node_done(self) -> None:
        self._shown.node_done()

    def round_done(self, line: RoundLine) -> None:
        epsilon = line.epsilon if isinstance(line.epsilon, float) else None
        self._write(status="running", round=line.number, used=line.clients, epsilon=epsilon)
        self._shown.round_done(line)

    def finished(self, result: dict[str, Any]) -> None:
        self._write(status=result["status"])
        self._shown.finished(result)

    def _take(self, line: Mapping[str, Any]) -> None:
        """What a line of ``metrics.jsonl`` says; it is written with what comes next."""
        values = self._values
        if line["phase"] == "event" and line.get("level") in ("warning", "error", "critical"):
            values["events"]["warning" if line["level"] == "warning" else "error"] += 1
        if line["phase"] != "train":
            return
        seconds = {phase: line[f"{phase}_seconds"] for phase in values["seconds"]}
        values |= {"excluded": len(line["excluded"]), "round_seconds": seconds}
        for phase, spent in seconds.items():
            values["seconds"][phase] += spent
        for direction in values["bytes"]:
            values["bytes"][direction] += line[f"bytes_{direction}"]
        for reason in line["excluded"].values():
            code = reason.partition(":")[0]
            values["exclusions"][code if code in SENTENCES else "other"] += 1

    def _write(self, **values: Any) -> None:
        self._values |= {**values, "updated": time.time()}
        self._file.write(self._values)


class JsonProgress(Progress):
    """A line of the log per round, with its figures as fields; what people are told beside it is logged already."""

    def __init__(self, config: RunConfig) -> None:
        self._rounds = config.run.rounds

    def round_started(self, number: int, clients: int) -> None:
        _log(f"round {number} of {self._rounds}: {clients} clients are asked", round=number, asked=clients)

    def round_done(self, line: RoundLine) -> None:
        fields: dict[str, Any] = {
            "round": line.number,
            "clients": line.clients,
            "seconds": line.seconds,
            "overhead": line.overhead,
        }
        fields |= {"epsilon": line.epsilon, "train_loss": line.train_loss, "scores": line.scores}
        _log(f"round {line.number} of {self._rounds} is complete", **fields)

    def finished(self, result: dict[str, Any]) -> None:
        fields = {name: result.get(name) for name in ("status", "rounds", "scores", "epsilon", "seconds", "warnings")}
        _log(f"the run is {result['status']}", **fields)


def _log(message: str, **fields: Any) -> None:
    shown = {name: value for name, value in fields.items() if value is not None}
    logging.getLogger("fedlab").info("%s", message, extra={FIELDS: shown})


def _count(nodes: Callable[[], Iterable[object]]) -> int | None:
    try:
        return sum(1 for _ in nodes())
    except Exception:  # a figure for people; whoever needs the nodes asks for them itself, and then it is an error
        return None
