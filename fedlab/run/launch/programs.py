"""Where the programs that come with a package are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fedlab.errors import ConfigError


def program_file(name: str) -> str:
    """The file of a program: beside this Python, else on the path. Raises ConfigError if there is none."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ConfigError(f"no program {name!r} beside {sys.executable} or on PATH; install flwr, which it comes with")
    return found
