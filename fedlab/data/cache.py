"""Files derived once and read by every process: named by what determines them, written whole or not at all.

They lie in ``$FEDLAB_CACHE``, or ``~/.cache/fedlab``. Deleting them costs time, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1  # raise when the meaning of a cached array changes


def cache_directory() -> Path:
    """Where cached files lie."""
    return Path(os.environ.get("FEDLAB_CACHE") or Path.home() / ".cache" / "fedlab")


def cached_arrays(kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays for ``key``, memory-mapped read-only; made and stored at the first call. A damaged entry is made again."""
    name = hashlib.sha256(json.dumps([FORMAT, kind, key], sort_keys=True, default=str).encode()).hexdigest()[:32]
    target = cache_directory() / kind / name
    if (found := _load(target)) is not None:
        return found
    arrays = make()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}."))
    for array_name, array in arrays.items():
        np.save(temporary / f"{array_name}.npy", array, allow_pickle=False)
    (temporary / "whole.json").write_text(json.dumps({a: v.nbytes for a, v in arrays.items()}))
    try:
        temporary.rename(target)
    except OSError:  # another process was first, or what lies there is damaged
        if (found := _load(target)) is None:
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        else:
            shutil.rmtree(temporary)
            return found
    return _load(target) or arrays


def _load(path: Path) -> dict[str, np.ndarray] | None:
    try:
        sizes: dict[str, int] = json.loads((path / "whole.json").read_text())
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in sizes}
    except (OSError, ValueError, EOFError):
        return None
    return arrays if all(arrays[name].nbytes == size for name, size in sizes.items()) else None
