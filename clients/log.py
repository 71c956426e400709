"""A client's own log: why it failed or refused, in words that may quote its data and never leave its machine.

In a simulation that is ``log.txt`` of the run directory, whose owner holds all the data anyway.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from pathlib import Path

from fedlab.errors import FedlabError


def note(path: Path, who: str, error: BaseException, what: str) -> None:
    """Append what went wrong: one line for an error of ours, its traceback too for any other.

    Args:
        path: the log; made, for its owner's eyes, if it is not there.
        who: client or node.
        error: as it was caught.
        what: did not come about.
    """
    stamp, kind = time.strftime("%Y-%m-%d %H:%M:%S"), type(error).__name__
    text = f"{stamp} WARNING {who}: {what}: {kind}: {error}\n"
    if not isinstance(error, FedlabError):
        text += "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):  # a log that cannot be written must not change what is answered
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
