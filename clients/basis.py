"""What stays as it is during a task: it reaches a node once, is kept under the hash of its content, and is never mixed
with another.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedlab.errors import FedlabError
from fedlab.lora.state import State, digest, write_state


def keep(directory: Path, basis: State) -> str:
    """Write a basis, whole or not at all, unless it is there; returns its hash."""
    name = digest(basis)
    path = directory / f"{name}.safetensors"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        write_state(path, basis)
    return name


@lru_cache(maxsize=2)
def held(directory: Path, name: str) -> State:
    """The basis of this hash. Raises FedlabError if it is not here, or is not what its name says."""
    path = directory / f"{name}.safetensors"
    try:
        basis: State = load_file(str(path))
    except (OSError, SafetensorError):
        raise FedlabError(
            f"basis {name[:12]} is not on this node: it never came, or belongs to another task; resume the run"
        ) from None
    if digest(basis) != name:
        raise FedlabError(f"{path} does not hold the basis that it is named after; remove it and resume the run")
    return basis
