"""The state between two rounds: enough to go on with the same bits, written whole or not at all.

A checkpoint is one safetensors file (adapter, head, and the strategy's server state) and one JSON file that names it.
The JSON file is replaced last, so it always points at complete tensors. Every random draw is named by its round, and
clients begin each round with a fresh optimiser, so neither needs saving; what clients keep (``fedlab.run.personal``)
they keep themselves. Only the newest checkpoint is kept.
"""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load_file

from fedlab.errors import ConfigError
from fedlab.lora.aggregator import ServerState
from fedlab.lora.state import State, digest, write_state
from fedlab.run.directory import RunDirectory

POINTER = "checkpoints/latest.json"
SERVER = "server/"  # before the names of the server state's tensors
EDITION = 2  # of what a checkpoint holds


def save_checkpoint(
    directory: RunDirectory, round_number: int, state: State, server_state: ServerState, extra: dict[str, Any]
) -> None:
    """Write what a run goes on from.

    Args:
        directory: of the run.
        round_number: the last complete round.
        state: after it.
        server_state: what the strategy keeps between rounds.
        extra: counts and scores, JSON values only.
    """
    folder = directory.path / "checkpoints"
    folder.mkdir(exist_ok=True)
    name = f"round-{round_number}.safetensors"
    tensors = {**state, **{f"{SERVER}{k}": v for k, v in server_state.items()}}
    write_state(folder / name, tensors)
    entry = {"edition": EDITION, "round": round_number, "file": name, "digest": digest(tensors), "extra": extra}
    directory.write_text(POINTER, json.dumps(entry))
    for old in folder.glob("round-*.safetensors"):
        if old.name != name:
            old.unlink()


def load_checkpoint(directory: RunDirectory) -> tuple[int, State, ServerState, dict[str, Any]] | None:
    """(round, state, server state, extra) of the newest checkpoint, or None.

    Raises ConfigError if an earlier edition wrote it, ValueError if its tensors are not those it names.
    """
    pointer = directory.path / POINTER
    if not pointer.is_file():
        return None
    entry = json.loads(pointer.read_text(encoding="utf-8"))
    if entry.get("edition") != EDITION:
        raise ConfigError(
            f"{pointer} was written by another edition of fedlab, which must resume it; or start a new run"
        )
    tensors: State = load_file(str(pointer.parent / entry["file"]))
    if digest(tensors) != entry["digest"]:
        raise ValueError(f"{pointer}: the tensors in {entry['file']} are not those of the checkpoint (digest differs)")
    server_state = {k.removeprefix(SERVER): v for k, v in tensors.items() if k.startswith(SERVER)}
    state = {k: v for k, v in tensors.items() if not k.startswith(SERVER)}
    return entry["round"], state, server_state, entry["extra"]
