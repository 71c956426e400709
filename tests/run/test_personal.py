"""What a client keeps: the newest of an earlier round, whole, two at most, and a broken file is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlab.errors import RunFailed
from fedlab.run.personal import load_personal, save_personal


def value(directory: Path, before: int) -> float | None:
    found = load_personal(directory, "client-0", before)
    return float(found["x"]) if found else None


def test_a_round_starts_from_the_newest_earlier_one_and_a_repeated_round_from_what_it_started_from(tmp_path: Path):
    assert value(tmp_path, 1) is None
    for number in (1, 3, 4):
        save_personal(tmp_path, "client-0", number, {"x": torch.tensor(float(number))})
    assert [value(tmp_path, before) for before in (5, 4, 3)] == [4.0, 3.0, None]
    save_personal(tmp_path, "client-0", 4, {"x": torch.tensor(40.0)})
    assert [value(tmp_path, before) for before in (5, 4)] == [40.0, 3.0]
    save_personal(
        tmp_path, "client-0", 3, {"x": torch.tensor(30.0)}
    )  # the run was cut off after round 2: round 4 never was
    assert [value(tmp_path, before) for before in (9, 4)] == [30.0, 30.0]
    assert value(tmp_path / "elsewhere", 9) is None


def test_a_broken_file_is_named_and_nothing_is_made_up_in_its_place(tmp_path: Path):
    save_personal(tmp_path, "client-0", 1, {"x": torch.tensor(1.0)})
    file = tmp_path / "client-0" / "round-1.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(RunFailed, match=r"round-1\.safetensors cannot be read"):
        load_personal(tmp_path, "client-0", 2)
