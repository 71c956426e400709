"""Start a program that can read little and write next to nothing: Linux's Landlock, which needs no privileges.

    python -I -S confine.py {"read": [...], "list": [...], "write": [...]} PROGRAM ARGUMENT ...

What runs here afterwards, and all that it starts, opens only files below ``read`` (and lists directories below
``list``, changes files below ``write``), can be no debugger of a process outside, and gets no further rights from
setuid programs. Standard library only: it is a file that Python is started with, not a module.

Landlock: https://docs.kernel.org/userspace-api/landlock.html (Linux 5.13; numbers of system calls are the same on all
architectures).
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence

CREATE, ADD, RESTRICT = 444, 445, 446  # system calls
VERSION = 1  # flag of CREATE: answer with the version
PATH_BENEATH = 1
NO_NEW_PRIVILEGES = 38  # of prctl
EXECUTE, WRITE_FILE, READ_FILE, READ_DIRECTORY = 1, 2, 4, 8
RIGHTS = (13, 13, 14, 15, 15, 16)  # how many each version knows, from the first; later ones none that matter here
ON_FILES = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14  # and truncate


class Ruleset(ctypes.Structure):
    """``struct landlock_ruleset_attr``, as the first version has it."""

    _fields_ = (("handled", ctypes.c_uint64),)


class Rule(ctypes.Structure):
    """``struct landlock_path_beneath_attr``."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def version() -> int:
    """Of Landlock on this system; 0 if there is none."""
    if not sys.platform.startswith("linux"):
        return 0
    found = ctypes.CDLL(None, use_errno=True).syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION))
    return max(0, int(found))


def confine(allowed: Mapping[str, Sequence[str]]) -> None:
    """Take everything but ``allowed`` from this process, for good. Raises OSError where that cannot be done.

    Args:
        allowed: ``read``, ``list`` and ``write`` → paths; those that are not there are passed over.
    """
    library = ctypes.CDLL(None, use_errno=True)
    known = version()
    if known < 1:
        raise OSError("this system has no Landlock")
    everything = (1 << RIGHTS[min(known, len(RIGHTS)) - 1]) - 1
    kinds = {"read": EXECUTE | READ_FILE | READ_DIRECTORY, "list": READ_DIRECTORY, "write": everything}
    ruleset = _called(library, CREATE, ctypes.byref(Ruleset(everything)), ctypes.sizeof(Ruleset), 0)
    try:
        for kind, paths in allowed.items():
            for path in paths:
                _allow(library, ruleset, path, kinds[kind] & everything)
        if library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        _called(library, RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(library: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            rights &= ON_FILES
        if rights:
            _called(library, ADD, ruleset, PATH_BENEATH, ctypes.byref(Rule(rights, parent)), 0)
    finally:
        os.close(parent)


def _called(library: ctypes.CDLL, number: int, *arguments: object) -> int:
    found = int(library.syscall(number, *arguments))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def main() -> None:
    """Confine this process and become the program."""
    allowed, command = json.loads(sys.argv[1]), sys.argv[2:]
    try:
        confine(allowed)
    except OSError as error:
        sys.exit(f"{command[0]} is not started: it could not be confined ({error})")
    os.execv(command[0], command)  # its own path: no search


if __name__ == "__main__":
    main()
