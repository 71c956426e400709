"""Fails an image's build where an installed package is not what the lock pins: ``python locked.py requirements.lock``.

A constraints file says nothing about a package that it does not name. This does.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

OURS = {"fedlab", "pip"}
CUDA = re.compile(r"nvidia-|cuda-|triton$")  # a CUDA build of torch pins these itself, exactly


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(lock: str) -> dict[str, str]:
    """Version by name of each line ``name==version``."""
    lines = (line.split("#")[0].strip() for line in lock.splitlines())
    return {canonical(name): version for name, version in (line.split("==") for line in lines if line)}


def strangers(installed: dict[str, str], pinned: dict[str, str]) -> list[str]:
    """What is installed and not pinned, or pinned otherwise. A local part (``+cpu``) makes no difference."""
    found = []
    for name, version in sorted(installed.items()):
        if name in OURS or (name not in pinned and CUDA.match(name)):
            continue
        if version.split("+")[0] != pinned.get(name):
            found.append(f"{name} {version}: the lock says {pinned.get(name, 'nothing')}")
    return found


if __name__ == "__main__":
    installed = {canonical(found.metadata["Name"]): found.version for found in distributions()}
    wrong = strangers(installed, pins(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.exit("\n".join(wrong) if wrong else 0)
