"""Files derived once and read by every process: named by what determines them, written whole or not at all.

They lie in ``$FEDLAB_CACHE``, or ``~/.cache/fedlab``. Deleting them costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlab.errors import ConfigError
from fedlab.files import naming

FORMAT = 1  # raise when the meaning of a cached array changes
ATTEMPTS = (
    10  # at replacing a damaged entry while other processes do the same; after that the arrays are used as they are
)


def cache_directory() -> Path:
    """Where cached files lie."""
    return Path(os.environ.get("FEDLAB_CACHE") or Path.home() / ".cache" / "fedlab")


def cached_arrays(
    kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays for ``key``, memory-mapped read-only; made and stored at the first call.

    A damaged entry is made again.
    """
    name = hashlib.sha256(json.dumps([FORMAT, kind, key], sort_keys=True, default=str).encode()).hexdigest()[:32]
    target = cache_directory() / kind / name
    if (found := _load(target)) is not None:
        return found
    arrays = make()
    with beside(target) as temporary:
        with naming(target):
            for array_name, array in arrays.items():
                np.save(temporary / f"{array_name}.npy", array, allow_pickle=False)
            (temporary / "whole.json").write_text(json.dumps({a: v.nbytes for a, v in arrays.items()}))
        _publish(temporary, target)
    return _load(target) or arrays


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A directory to make an entry of the cache in, to be renamed to ``target``; whatever is left of it goes.

    Raises ConfigError where the cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {target.parent}: {error.strerror}; set FEDLAB_CACHE to a directory that can be written"
        ) from None
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, target: Path) -> None:
    """Give a whole entry its name, unless another process was first.

    A damaged one is moved aside, which only one process can do.
    """
    for _ in range(ATTEMPTS):
        try:
            temporary.rename(target)
            return
        except OSError:
            if _load(target) is not None:
                return
        aside = temporary.with_name(f"{temporary.name}.damaged")
        with contextlib.suppress(OSError):  # another process was first at that, too
            target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _load(path: Path) -> dict[str, np.ndarray] | None:
    try:
        sizes = json.loads((path / "whole.json").read_text())
        if not isinstance(sizes, dict) or not sizes:
            return None
        arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in sizes}
    except (OSError, ValueError, EOFError):
        return None
    return arrays if all(arrays[name].nbytes == size for name, size in sizes.items()) else None
