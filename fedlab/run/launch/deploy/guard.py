"""Become another program, which ends when the process that started it does: ``python guard.py PID COMMAND …``.

A supervisor that is killed cannot stop its children; the kernel does it for it (Linux; elsewhere they stay). It runs
before anything of a virtual environment is imported, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        raise SystemExit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
