"""Disks that are full: small file systems of their own for a client's home, and for what the server remembers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import House, wait_for


def can() -> bool:
    return (
        os.geteuid() == 0
        and not subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs t /mnt"], capture_output=True).returncode
    )


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can(), reason="no file system of its own can be made here (mount needs root)"),
]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Makes a file system of so many MiB."""
    made: list[Path] = []

    def mount(name: str, size: int) -> Path:
        path = tmp_path / name
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(path)], check=True)
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", "-l", str(path)], check=False)


def fill(path: Path) -> Path:
    """Fill a file system to the last byte."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def test_a_client_whose_disk_is_full_sits_out_and_comes_back(
    small: Callable[[str, int], Path], tmp_path: Path, tiny_bert: Path, tiny_data: Path, tiny_toml: str
):
    home = small("home", 48)
    (tmp_path / "house").mkdir()
    house = House(tmp_path / "house", tiny_bert, tiny_data, tiny_toml)
    try:
        house.serve()
        house.join("north", 0, home=home)
        house.join("south", 1)
        process = house.run("run.rounds=5", "run.timeout=60", "privacy.participations=5", "train.steps=40", out="full")
        wait_for(lambda: len(house.rounds("full")) >= 1, 400, "a round")
        filler = fill(home)
        wait_for(lambda: any(line["excluded"] for line in house.rounds("full")), 400, "a round without it")
        filler.unlink()
        assert process.wait(600) == 0, house.said("full")
        result = house.check("full", {"north": home})
        assert (result["status"], result["rounds"]) == ("completed", 5)
        reasons = {reason for line in house.rounds("full") for reason in line["excluded"].values()}
        assert reasons == {"storage: its disk is full, or cannot be written; its log says where"}
        assert "north" in house.rounds("full")[-1]["clients"]
    finally:
        house.close()


def test_a_server_whose_disk_is_full_ends_the_run_which_resumes_when_there_is_room(
    small: Callable[[str, int], Path], tmp_path: Path, tiny_bert: Path, tiny_data: Path, tiny_toml: str
):
    (tmp_path / "house").mkdir()
    house = House(tmp_path / "house", tiny_bert, tiny_data, tiny_toml)
    runs = small("house/runs", 16)
    try:
        house.serve()
        house.join("north", 0)
        process = house.run("run.rounds=3", "train.steps=40", out="runs/out")
        wait_for(lambda: len(house.rounds("runs/out")) >= 1, 400, "a round")
        filler = fill(runs)
        assert process.wait(600) == 4, house.said("runs/out")
        assert "No space left on device" in house.said("runs/out")
        filler.unlink()
        assert house.fedlab("resume", "runs/out", out="resumed") == 0, house.said("resumed")
        result = house.check("runs/out")
        assert (result["status"], result["rounds"]) == ("completed", 3)
    finally:
        house.close()
