"""Ctrl-C that cannot get lost.

A signal handler runs wherever the main thread happens to be; an exception that it raises inside a destructor or a
callback of a library is printed and forgotten. So the handler also leaves a note, and the round loop looks at it.
SIGTERM (a batch system, ``docker stop``) and SIGHUP (the terminal was closed) are interrupts like Ctrl-C.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_installed = False
_requested = False
_deferred = False


def install() -> None:
    """Turn signals into KeyboardInterrupt, raised at once and again at the next ``check``.

    For the command line only. A SIGHUP that is ignored, as ``nohup`` has it, stays ignored.
    """
    global _installed, _requested
    _installed, _requested = True, False
    _handle_all()


def reinstall() -> None:
    """Take the signals back from a library that has put its own handlers there (Ray); nothing without ``install``."""
    if _installed and threading.current_thread() is threading.main_thread():
        _handle_all()


def check() -> None:
    """Raise KeyboardInterrupt if one was asked for."""
    if _requested and not _deferred:
        raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[None]:
    """While it is open, a signal is noted and raises nothing: the end of a run is written down whole."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def _handle_all() -> None:
    for number in NUMBERS:
        if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
    if not _deferred:
        raise KeyboardInterrupt
