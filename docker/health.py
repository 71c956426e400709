"""Whether a container works. ``python health.py CHECK...``: exit code 0, or 1 with the first check that fails.

Checks:
    https://127.0.0.1:8443/health      an answer of 200; the certificate of a container's own server is not verified
    listens:/run/fedlab/trainer.sock   a process of this container listens there; it is not disturbed
    process:flower-supernode           a program, or a module of Python, of that name runs

It imports nothing of fedlab, so that it costs little at every interval.
"""

from __future__ import annotations

import ssl
import sys
import urllib.request
from pathlib import Path

SECONDS = 8.0
ACCEPTS = 0x10000  # the kernel's __SO_ACCEPTCON


def problem(check: str) -> str | None:
    """What is wrong by one check; None if nothing is."""
    kind, _, what = check.partition(":")
    try:
        if kind == "listens":
            if what not in listening():
                return f"nobody listens at {what}"
        elif kind == "process":
            if what not in running():
                return f"{what} does not run"
        else:
            own = ssl._create_unverified_context() if kind == "https" else None
            urllib.request.build_opener(
                urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=own)] if own else [])
            ).open(check, timeout=SECONDS).close()
    except OSError as error:
        return f"{check}: {error}"
    return None


def listening() -> set[str]:
    """Unix sockets of this network namespace that take connections, as the kernel lists them."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return {words[7] for words in lines if len(words) > 7 and int(words[3], 16) & ACCEPTS}


def running() -> set[str]:
    """Names of this container's programs: of each process the first three words, without their folders."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")[:3]
        except OSError:  # it has ended meanwhile
            continue
        found |= {Path(word.decode(errors="replace")).name for word in words}
    return found


if __name__ == "__main__":
    sys.exit(next((wrong for wrong in map(problem, sys.argv[1:]) if wrong), 0))
