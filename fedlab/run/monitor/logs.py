"""Log lines for people or, on request, for machines: one JSON object per line on standard output.

What a line may say differs by machine. On the coordinator's there are no records of clients. On a client's, whatever a
library or an error says may quote its data, so it stays in the owner's log file, and to standard output goes only what
``tell`` is given: fixed words, codes, numbers and names that are public anyway.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedlab.run.directory import jsonable
from fedlab.run.output import lasting, say

Form = Literal["plain", "json"]
OPERATIONS = "fedlab.operations"
FIELDS = "fields"  # attribute of a record: what else its JSON object has
PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def tell(message: str, level: int = logging.INFO, **fields: str | float | None) -> None:
    """Say what a process does, in words that may leave any machine.

    Args:
        message: never a value of a record, nor the text of an error that may quote one.
        level: of ``logging``.
        fields: of the JSON object, such as ``client``, ``round`` or ``process``; None is left out.
    """
    known = {name: value for name, value in fields.items() if value is not None}
    logging.getLogger(OPERATIONS).log(level, "%s", message, extra={FIELDS: known})


def configure(form: Form) -> None:
    """How the log of this process is written, once, after ``output.settle``. For servers and runs, which hold no data
    of clients.

    ``plain``: as ever; warnings on standard error while no run is open, and what is told on standard output. ``json``:
    all of it on standard output, one object per line, with the warnings of libraries.
    """
    own, foreign, told = (logging.getLogger(name) for name in ("fedlab", "py.warnings", OPERATIONS))
    root = logging.getLogger()
    for logger in (root, own, foreign, told):
        for handler in [h for h in logger.handlers if isinstance(h, _Said)]:
            logger.removeHandler(handler)
    told.setLevel(logging.INFO)
    if form == "plain":
        told.addHandler(_Plainly())
        return
    for logger in (own, foreign):
        logger.addHandler(_AsJson())
        logger.propagate = False
    own.setLevel(logging.INFO)
    root.addHandler(_AsJson(logging.WARNING))


def keep_at_home(path: Path, form: Form) -> None:
    """Send everything that this process prints, warns of or logs to a file, except what is told. For trainers.

    Standard output and error are the file from now on, also for native code and the tracebacks of a crash. ``form`` is
    that of the file's log lines and of standard output.

    Args:
        path: the owner's log; made, for its owner's eyes, if it is not there. Where it cannot be written, nothing is
            kept, and nothing printed either.
        form: of lines.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    outside = lasting(os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace", buffering=1))
    kept = _opened(path)
    os.dup2(kept, 1)
    os.dup2(kept, 2)
    os.close(kept)
    own, told = logging.getLogger("fedlab"), logging.getLogger(OPERATIONS)
    at_home = logging.StreamHandler(sys.stderr)
    at_home.setFormatter(JsonLines() if form == "json" else logging.Formatter(PLAIN))
    for logger in (own, logging.getLogger("py.warnings")):
        logger.handlers[:] = [at_home]
        logger.propagate = False
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    handler = logging.StreamHandler(outside)
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(message)s"))
    told.handlers[:] = [handler]
    told.setLevel(logging.INFO)


def _opened(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


class JsonLines(logging.Formatter):
    """One record as one line of ASCII: ``time`` (UTC), ``level``, ``logger``, ``message``, and ``round``, ``client``
    and other fields where they are known. Of an exception its kind: its text and traceback stay in log files.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in ("round", "client") if hasattr(record, name)}
        line |= getattr(record, FIELDS, {})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
        return json.dumps(jsonable(line), default=str)


class _Said(logging.Handler):
    """A handler of ``configure``."""


class _Plainly(_Said):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:  # the others are said as every warning is
            say(record.getMessage())


class _AsJson(_Said):
    def __init__(self, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))
