"""The state between two rounds: enough to go on with the same bits, written whole or not at all.

A checkpoint is one safetensors file (adapter and head) and one JSON file that names it; the JSON file is replaced last, so it
always points at complete tensors. Clients keep nothing between rounds and every random draw is named by its round, so neither a
generator nor an optimiser needs saving. Only the newest checkpoint is kept.
"""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load_file, save_file

from fedlab.lora.state import State, digest
from fedlab.run.directory import RunDirectory

POINTER = "checkpoints/latest.json"


def save_checkpoint(directory: RunDirectory, round_number: int, state: State, extra: dict[str, Any]) -> None:
    """Write the state after ``round_number`` and what the server needs beside it (JSON values only)."""
    folder = directory.path / "checkpoints"
    folder.mkdir(exist_ok=True)
    name = f"round-{round_number}.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, str(folder / name))
    directory.write_text(POINTER, json.dumps({"round": round_number, "file": name, "digest": digest(state), "extra": extra}))
    for old in folder.glob("round-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_checkpoint(directory: RunDirectory) -> tuple[int, State, dict[str, Any]] | None:
    """(round, state, extra) of the newest checkpoint, or None. Raises ValueError if its tensors are not those it names."""
    pointer = directory.path / POINTER
    if not pointer.is_file():
        return None
    entry = json.loads(pointer.read_text(encoding="utf-8"))
    state: State = load_file(str(pointer.parent / entry["file"]))
    if digest(state) != entry["digest"]:
        raise ValueError(f"{pointer}: the tensors in {entry['file']} are not those of the checkpoint (digest differs)")
    return entry["round"], state, entry["extra"]
