"""What fedlab says to people: through a pipe that may be closed, on a terminal that may know no ε.

Whatever becomes of it, a run goes on: nothing here raises because somebody stopped reading. Square brackets are printed
as they stand; rich would take them for markup. Files are another matter (``fedlab.files``).
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import sys
from typing import Any, TextIO, cast

from rich.console import Console

# How a character is spelt where the output's encoding lacks it; others are written as escapes.
SPELT = {
    "ε": "epsilon", "σ": "sigma", "δ": "delta", "α": "alpha", "µ": "mu", "λ": "lambda", "Σ": "sum", "√": "sqrt ",
    "–": "-", "—": "-", "−": "-", "×": "x", "·": "*", "…": "...", "≥": ">=", "≤": "<=", "±": "+-", "→": "->",
    "∞": "inf", "‖": "||", "²": "^2", "ᵀ": "^T", "₀": "_0", "’": "'", "“": '"', "”": '"',
}  # fmt: skip


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return "".join(SPELT.get(c, c.encode("ascii", "backslashreplace").decode()) for c in missing), error.end


codecs.register_error("fedlab.spelt", _spell)


class LastingStream:
    """A text stream that may be closed at its other end, or lack characters, without anybody noticing.

    Args:
        stream: where the text goes as long as it can.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or pretend to."""
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "fedlab.spelt").decode(encoding))
        except (OSError, ValueError):
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush, or pretend to."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """From now on nobody reads: what is still buffered must not fail when the interpreter ends either."""
        with contextlib.suppress(OSError, ValueError):
            descriptor, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def lasting(stream: TextIO | None) -> TextIO:
    """The stream, made lasting; a closed one (None) swallows everything."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 (open as long as the process)
    return stream if isinstance(stream, LastingStream) else cast(TextIO, LastingStream(stream))


def say(text: str) -> None:
    """Print a line to standard output now."""
    print(text, file=lasting(sys.stdout), flush=True)


def complain(text: str) -> None:
    """Print a line to standard error now."""
    print(text, file=lasting(sys.stderr), flush=True)


def console() -> Console:
    """A console of rich that takes brackets and colons for what they are."""
    return Console(file=lasting(sys.stdout), markup=False, highlight=False, emoji=False)


def is_live() -> bool:
    """Whether standard output is a terminal on which lines can be redrawn."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def settle(quiet: bool = False) -> None:
    """Prepare this process's output, once: for the command line, which owns the process.

    Descriptors 0 to 2 are opened where the caller closed them, or a run's files would be taken for them. Warnings of
    libraries, and fedlab's own log, no longer go to the terminal by themselves: a run has a file for them.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    own = logging.getLogger("fedlab")
    own.propagate = False  # a library that configures the root logger would double every line
    for handler in [h for h in own.handlers if isinstance(h, _Outside)]:
        own.removeHandler(handler)
    own.addHandler(_Outside(logging.CRITICAL if quiet else logging.WARNING))
    foreign = logging.getLogger("py.warnings")
    foreign.propagate = False
    if not any(isinstance(h, logging.NullHandler) for h in foreign.handlers):
        foreign.addHandler(logging.NullHandler())
    logging.captureWarnings(True)


class _Outside(logging.Handler):
    """Says fedlab's warnings on standard error while no run's log does."""

    def emit(self, record: logging.LogRecord) -> None:
        if all(isinstance(handler, _Outside) for handler in logging.getLogger("fedlab").handlers):
            complain(f"fedlab: {record.levelname.lower()}: {record.getMessage()}")
