"""The state between two rounds: enough to go on with the same bits, written whole or not at all.

A checkpoint is one safetensors file (adapter and head) and one JSON file that names it; the JSON file is replaced last,
so it always points at complete tensors. Every random draw is named by its round, and clients begin each round with a
fresh optimiser, so neither needs saving; what clients keep (``fedlab.run.personal``) they keep themselves. Only the
newest checkpoint is kept.
"""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load_file

from fedlab.lora.state import State, digest, write_state
from fedlab.run.directory import RunDirectory

POINTER = "checkpoints/latest.json"
MEMORY = "server/"  # before the names of tensors that are no part of the state


def save_checkpoint(
    directory: RunDirectory, round_number: int, state: State, memory: State, extra: dict[str, Any]
) -> None:
    """Write the state after ``round_number``, the server's own tensors (``memory``), and what it needs beside them
    (JSON values only).
    """
    folder = directory.path / "checkpoints"
    folder.mkdir(exist_ok=True)
    name = f"round-{round_number}.safetensors"
    tensors = {**state, **{f"{MEMORY}{k}": v for k, v in memory.items()}}
    write_state(folder / name, tensors)
    directory.write_text(
        POINTER, json.dumps({"round": round_number, "file": name, "digest": digest(tensors), "extra": extra})
    )
    for old in folder.glob("round-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_checkpoint(directory: RunDirectory) -> tuple[int, State, State, dict[str, Any]] | None:
    """(round, state, memory, extra) of the newest checkpoint, or None.

    Raises ValueError if its tensors are not those it names.
    """
    pointer = directory.path / POINTER
    if not pointer.is_file():
        return None
    entry = json.loads(pointer.read_text(encoding="utf-8"))
    tensors: State = load_file(str(pointer.parent / entry["file"]))
    if digest(tensors) != entry["digest"]:
        raise ValueError(f"{pointer}: the tensors in {entry['file']} are not those of the checkpoint (digest differs)")
    memory = {k.removeprefix(MEMORY): v for k, v in tensors.items() if k.startswith(MEMORY)}
    return entry["round"], {k: v for k, v in tensors.items() if not k.startswith(MEMORY)}, memory, entry["extra"]
