"""What the seal at a run's end covers: every file in the run directory, but for what cannot be known by then.

The adapter waits under another name until the line that seals it is on the disk, so that a run cut off at any moment
holds no adapter that nothing vouches for. ``fedlab.privacy.audit`` reads the seal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

ADAPTER, UNSEALED_ADAPTER = "adapter", "adapter.unsealed"
# What is not in the seal: what goes on being written, what is sealed by other lines, what is made again from the rest.
OPEN_FILES = {"log.txt", "receipts.jsonl", "empirical.json"}
OPEN_FOLDERS = {"ledger", "tensorboard", "bases"}


def measure(root: Path, planned: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Path → size and SHA-256 of what the seal covers.

    Args:
        root: the run directory.
        planned: files that are written after the seal, name → text.
    """
    found = {name: (len(text.encode()), hashlib.sha256(text.encode()).hexdigest()) for name, text in planned.items()}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        top = name.partition("/")[0]
        if top == UNSEALED_ADAPTER:
            name = ADAPTER + name.removeprefix(UNSEALED_ADAPTER)
        if name in planned or name in OPEN_FILES or top in OPEN_FOLDERS or path.name.startswith("."):
            continue
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                found[name] = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return found
