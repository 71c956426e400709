"""Ctrl-C that cannot get lost.

A signal handler runs wherever the main thread happens to be; an exception that it raises inside a destructor or a
callback of a library is printed and forgotten. So the handler also leaves a note, and the round loop looks at it.
"""

from __future__ import annotations

import signal
from types import FrameType

_requested = False


def install() -> None:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, raised at once and again at the next ``check``.

    For the command line only.
    """
    global _requested
    _requested = False
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)


def check() -> None:
    """Raise KeyboardInterrupt if one was asked for."""
    if _requested:
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    raise KeyboardInterrupt
