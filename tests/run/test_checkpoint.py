"""A checkpoint is whole at every moment: whatever is cut off, the run goes on from the last round that was complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from fedlab.config import RunConfig
from fedlab.errors import Unwritable
from fedlab.lora.state import State
from fedlab.run.checkpoint import load_checkpoint, save_checkpoint
from fedlab.run.directory import RunDirectory

REPLACE, RENAME, UNLINK = os.replace, os.rename, os.unlink


@pytest.fixture
def directory(tiny_toml: str, tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(RunConfig.parse(tiny_toml), tmp_path / "run")


def state(value: float) -> State:
    return {"a.lora_A": torch.full((2, 3), value), "a.lora_B": torch.full((4, 2), -value)}


def save(directory: RunDirectory, number: int) -> None:
    save_checkpoint(directory, number, state(number), {"first/a": torch.tensor(number)}, {"rounds": number})


def held(directory: RunDirectory) -> int:
    """The round that a checkpoint is of; all of it must be of that round."""
    found = load_checkpoint(directory)
    assert found is not None
    number, tensors, server_state, extra = found
    assert tensors.keys() == state(0).keys()
    assert all(torch.equal(tensors[name], value) for name, value in state(number).items())
    assert server_state == {"first/a": torch.tensor(number)}
    assert extra == {"rounds": number}
    return number


def test_the_newest_is_held_and_older_tensors_are_gone(directory: RunDirectory):
    assert load_checkpoint(directory) is None
    for number in (1, 2, 10):
        save(directory, number)
        assert held(directory) == number
    assert [file.name for file in (directory.path / "checkpoints").glob("*.safetensors")] == ["round-10.safetensors"]


class Dying:
    """Renames and removals of files, of which the ``fatal``-th ends the process, before it is made or ``after`` it."""

    def __init__(self, fatal: int, after: bool) -> None:
        self.fatal, self.after, self.seen = fatal, after, 0

    def around(self, real: Any) -> Any:
        def change(path: Any, *arguments: Any, **options: Any) -> None:
            if real is UNLINK and str(path).endswith(".tmp"):
                return real(path, *arguments, **options)  # its own temporary file: nobody looks at it
            self.seen += 1
            if self.seen == self.fatal and not self.after:
                raise KeyboardInterrupt
            real(path, *arguments, **options)
            if self.seen == self.fatal:
                raise KeyboardInterrupt

        return change


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_save_that_is_cut_off_at_any_change_of_a_file_leaves_one_whole_checkpoint(
    after: bool, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    save(directory, 1)
    points, number, finished = 0, 1, False
    while not finished:
        points += 1
        with monkeypatch.context() as patched:
            dying = Dying(points, after)
            for name, real in (("replace", REPLACE), ("rename", RENAME), ("unlink", UNLINK)):
                patched.setattr(os, name, dying.around(real))
            try:
                save(directory, number + 1)
                finished = True
            except KeyboardInterrupt:
                pass
        assert held(directory) in ([number + 1] if finished else [number, number + 1])
        number = held(directory)
    assert points > 3, "tensors, pointer, and the old tensors"


def test_tensors_that_cannot_be_written_leave_the_round_before(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
):
    import fedlab.lora.state as tensors

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    save(directory, 1)
    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(Unwritable, match=r"round-2\.safetensors: No space left on device; make room"):
        save(directory, 2)
    assert held(directory) == 1


@pytest.mark.parametrize("change", ["flip", "cut"])
def test_tensors_that_are_not_those_of_the_pointer_are_refused(change: str, directory: RunDirectory):
    save(directory, 3)
    file = directory.path / "checkpoints" / "round-3.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if change == "flip" else data[:-4])
    with pytest.raises((ValueError, SafetensorError)):
        load_checkpoint(directory)
