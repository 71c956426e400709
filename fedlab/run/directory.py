"""``RUN_DIR``: the files of a run, each written whole or not at all.

See ``docs/run-directory.md`` for every file. ``result.json`` is written last; a directory without one belongs to a run
that is still going or was killed, and ``fedlab resume`` continues it from its last checkpoint. ``environment.json``
says in which format the files are; another one is refused in one line. ``fedlab audit`` reads directories by itself, of
any format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.files import write

FORMAT = 3  # of the files of a run; raise when a run of before could not be resumed
# What a start makes before the first round, and what only a run has that got further.
STARTED = {
    *("run.toml", "environment.json", "result.json", "partition.json", "data.json", "metrics.jsonl"),
    *("log.txt", "report.html", "samples.json", "PRIVACY.md", "receipts.jsonl", "ledger", "tensorboard", "bases"),
    "deployment.json",
}
KEPT = {"checkpoints", "adapter", "personal", "memory.safetensors", "task.json", "empirical.json"}
FINISHED = ("completed", "budget-exhausted")  # the states of a run that ended by itself
PACKAGES = (
    "flwr",
    "ray",
    "torch",
    "transformers",
    "peft",
    "opacus",
    "dp-accounting",
    "flwr-datasets",
    "datasets",
    "numpy",
)


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run.

    Args:
        path: absolute, of a directory that has ``run.toml`` and ``environment.json``; use ``create`` or ``open``.
    """

    path: Path

    @classmethod
    def create(cls, config: RunConfig, out: Path | None) -> RunDirectory:
        """Make the directory (default ``runs/<name>-<time>``) with ``run.toml`` and ``environment.json`` in it."""
        path = (out or cls.new_place(Path("runs"), config.run.name)).absolute()
        cls.check_place(path)
        directory = cls(path)
        if path.is_dir():
            directory._clear()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {str(path)!r} cannot be created: {error.strerror}") from None
        try:
            directory.write_json("environment.json", {"format": FORMAT, "run_id": uuid4().hex, **environment()})
            directory.write_text("run.toml", config.to_toml())  # last: what has one is a run directory
        except BaseException:
            directory._clear()  # or half a start would block the next
            raise
        return directory

    @staticmethod
    def new_place(runs: Path, name: str) -> Path:
        """Where a run of this name goes among others: ``<name>-<time>``."""
        return runs / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"

    @classmethod
    def check_place(cls, path: Path) -> None:
        """Raise ConfigError where no run can be put: something is there, other than a start that came to nothing."""
        if not path.exists() or (path.is_dir() and not any(path.iterdir())) or cls(path).never_began:
            return
        more = f"; fedlab resume {path} goes on with the run in it" if cls(path)._unfinished else ""
        raise ConfigError(
            f"--out {str(path.absolute())!r} exists and is not empty; a run never overwrites another, choose a new"
            f" directory{more}"
        )

    @property
    def never_began(self) -> bool:
        """Whether this is what a start left that failed, or was interrupted, before anything was charged or trained.

        The corrected command may use its directory: all that is lost is why it failed, and that stays in ``log.txt``.
        """
        if not self.path.is_dir() or {entry.name for entry in self.path.iterdir()} & KEPT:
            return False
        parts = [RunDirectory(file.parent) for file in self.path.glob("*/run.toml")]  # a stream's tasks
        known = STARTED | {part.path.name for part in parts}
        if not {entry.name for entry in self.path.iterdir()} <= known or _charged(self.path / "ledger"):
            return False
        ended = (self.path / "result.json").is_file() and self._status in ("failed", "interrupted")
        trained = self.path / "metrics.jsonl"
        if trained.is_file() and b'"phase": "train"' in trained.read_bytes():
            return False
        return (ended or bool(parts)) and all(part.never_began for part in parts)

    @property
    def _status(self) -> str | None:
        try:
            return str((self.result or {}).get("status"))
        except (OSError, ValueError, AttributeError):
            return None

    @property
    def _unfinished(self) -> bool:
        return (self.path / "run.toml").is_file() and self._status not in FINISHED

    def _clear(self) -> None:
        """Remove what a start left that came to nothing, but for its log."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "log.txt":
                entry.unlink()

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run directory. Raises ConfigError if it is none, or was written in another format."""
        if not (path / "run.toml").is_file():
            raise ConfigError(f"{str(path)!r} is no run directory: it has no run.toml")
        directory = cls(path.absolute())
        if (found := directory.format) != FORMAT:
            age = "an earlier" if found < FORMAT else "a later"
            raise ConfigError(
                f"{str(path)!r} was written by {age} version of fedlab (format {found}, this one has {FORMAT}) and"
                " cannot be resumed or reported on with this one; fedlab audit reads it"
            )
        return directory

    @property
    def config(self) -> RunConfig:
        """The resolved configuration the run was started with."""
        return RunConfig.load(self.path / "run.toml")

    @property
    def format(self) -> int:
        """Format of the files in it; 1 if nothing says, as before there were numbers."""
        try:
            found = json.loads((self.path / "environment.json").read_text(encoding="utf-8")).get("format", 1)
        except (OSError, ValueError, AttributeError):
            return 1
        return found if isinstance(found, int) else 1

    @property
    def run_id(self) -> str:
        """The run's name in ledgers and messages, 32 random hex digits."""
        return str(json.loads((self.path / "environment.json").read_text(encoding="utf-8"))["run_id"])

    @property
    def result(self) -> dict[str, Any] | None:
        """``result.json``, or None while there is none."""
        file = self.path / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @property
    def finished(self) -> dict[str, Any] | None:
        """``result.json`` of a run that ended by itself, to which nothing can be added; None for any other."""
        result = self.result
        return result if result is not None and result["status"] in FINISHED else None

    def write_text(self, name: str, text: str, mode: int | None = None) -> None:
        """Replace a file atomically: readers see the old one or the new one, also after a crash.

        ``mode``: its permissions; default: those that the umask leaves.
        """
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, text, mode)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write strict JSON; a float that is not a number becomes null."""
        self.write_text(name, json_text(value))

    def file_digest(self, name: str) -> str:
        """SHA-256 (hex) of a file."""
        with (self.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(value: Mapping[str, Any]) -> str:
    """The JSON that a run directory's files hold."""
    return json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n"


def _charged(ledgers: Path) -> bool:
    """Whether a ledger below this folder has a line that spent something, or one that cannot be read."""
    for file in ledgers.rglob("*.jsonl"):
        try:
            kinds = {json.loads(line)["type"] for line in file.read_text(encoding="utf-8").splitlines()}
        except (OSError, ValueError, KeyError, TypeError):
            return True
        if not kinds <= {"PLAN", "START", "REFUSE", "CLOSE"}:
            return True
    return False


def jsonable(value: Any) -> Any:
    """The value with NaN as null, infinities as strings, and tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value


def environment() -> dict[str, Any]:
    """Versions, source commit and hardware: what else could change a result."""
    import torch

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fedlab": version("fedlab"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "command": sys.argv,
    }


def _commit() -> str | None:
    """Commit of the source tree that fedlab runs from, with ``-dirty`` if it differs; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
