"""What a client keeps of a model for itself between rounds: tensors that are trained but never sent.

One file per round and client below a directory that the client's node can reach; a round starts from the newest file of
an *earlier* round, so that a resumed run, which repeats a round, starts from what that round started from. The two
newest are kept.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedlab.errors import RunFailed
from fedlab.files import below
from fedlab.lora.state import State, write_state


def load_personal(directory: Path, client: str, round_number: int) -> State:
    """A client's own tensors as they were before a round (from 1); empty if it has none yet.

    RunFailed for a file that is broken.
    """
    files = [path for number, path in _files(directory, client) if number < round_number]
    try:
        return dict(load_file(str(files[-1]))) if files else {}
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{files[-1]} cannot be read ({error}); restore it, or remove it to go on from the round before"
        ) from None


def save_personal(directory: Path, client: str, round_number: int, tensors: State) -> None:
    """Keep what a round left, whole or not at all, and on the disk when this returns."""
    folder = below(directory, client)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_state(folder / f"round-{round_number}.safetensors", tensors)
    files = _files(directory, client)
    kept = [path for number, path in files if number <= round_number][
        -2:
    ]  # later ones belong to a run that was cut off
    for _, old in files:
        if old not in kept:
            old.unlink()


def _files(directory: Path, client: str) -> list[tuple[int, Path]]:
    found = [
        (int(path.stem.removeprefix("round-")), path) for path in below(directory, client).glob("round-*.safetensors")
    ]
    return sorted(found)
