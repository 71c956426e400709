"""A network that is cut between a client and its server: the client has one of its own, whose cable is pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import House, wait_for

NAME = f"fedlab{os.getpid()}"
OUTER, INNER = f"fl{os.getpid()}a", f"fl{os.getpid()}b"
SUBNET = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
HERE, THERE = f"{SUBNET}.1", f"{SUBNET}.2"


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True).returncode == 0


def can() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0 or not ip("netns", "add", NAME):
        return False
    ip("netns", "del", NAME)
    return True


pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can(), reason="no network of its own can be made here (ip netns needs root)"),
]


@pytest.fixture
def cable() -> Iterator[None]:
    """A network namespace, and a pair of interfaces between it and this one."""
    try:
        assert ip("netns", "add", NAME)
        assert ip("link", "add", OUTER, "type", "veth", "peer", "name", INNER, "netns", NAME)
        assert ip("addr", "add", f"{HERE}/30", "dev", OUTER)
        assert ip("link", "set", OUTER, "up")
        inside = ("netns", "exec", NAME, "ip")
        assert ip(*inside, "addr", "add", f"{THERE}/30", "dev", INNER)
        assert all(ip(*inside, "link", "set", device, "up") for device in (INNER, "lo"))
        yield
    finally:
        ip("netns", "del", NAME)
        ip("link", "del", OUTER)


def test_a_cut_network_costs_a_round_and_no_charge_twice(
    cable: None, tmp_path: Path, tiny_bert: Path, tiny_data: Path, tiny_toml: str
):
    house = House(tmp_path, tiny_bert, tiny_data, tiny_toml, host=HERE)
    try:
        house.serve()
        house.join("north", 0, before=("ip", "netns", "exec", NAME))
        house.join("south", 1, before=("ip", "netns", "exec", NAME))
        process = house.run("run.rounds=4", "run.timeout=30", "privacy.participations=4", "train.steps=40", out="cut")
        house.in_training("north", 2)
        assert ip("link", "set", OUTER, "down")
        wait_for(lambda: "no reply within 30 s" in house.said("cut") or process.poll() is not None, 300, "the end")
        assert ip("link", "set", OUTER, "up")
        assert process.wait(600) in (0, 4), house.said("cut")
        if process.returncode == 4:  # both were cut off, and asked once again
            assert "fedlab resume" in house.said("cut") or "usable updates" in house.said("cut")
            assert house.fedlab("resume", "cut", out="cut-resumed") == 0, house.said("cut-resumed")
        result = house.check("cut")
        assert (result["status"], result["rounds"]) == ("completed", 4)
        for name in ("north", "south"):
            charges = [line for line in house.ledger(name) if line["type"] == "CHARGE"]
            commits = [line for line in house.ledger(name) if line["type"] == "COMMIT"]
            assert len(charges) == len(commits) <= 4, "what was computed while the network was cut is not lost"
    finally:
        house.close()
