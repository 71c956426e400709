"""Real processes under shared noise: three clients, one killed between masking and unmasking, one before it masks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlab.privacy.ledger.keys import load_or_create_key, public_hex

from .conftest import House, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ("east", "north", "south")
SHARED = ("train.steps=1", "train.sampling_rate=0.9", "train.physical_batch=1", "train.momentum=0", "run.rounds=2")


@pytest.fixture
def house(
    houses: dict[str, House], tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_data: Path, tiny_toml: str
) -> Iterator[House]:
    """A server and three clients that know each other's keys."""
    if not houses:
        houses["made"] = made = House(tmp_path_factory.mktemp("house"), tiny_bert, tiny_data, tiny_toml)
        made.serve()
        peers = ["[roster]"]
        for name in NAMES:
            folder = made.folder / name / "ledger" / "keys"
            folder.mkdir(parents=True, mode=0o700)
            peers.append(f'{name} = "{public_hex(load_or_create_key(folder / f"{name}.pem"))}"')
        for number, name in enumerate(NAMES):
            made.join(name, number, policy="shared_noise = true", more="\n".join(peers))
    yield houses["made"]
    houses["made"].end_runs()


def masked(house: House, name: str, number: int) -> bool:
    """Whether a client has written down what it masked in a round."""
    return any((house.folder / name).rglob(f"keys/*/round-{number}.masked"))


def test_one_that_is_killed_between_masking_and_unmasking_is_in_the_sum(house: House):
    process = house.run(*SHARED, "privacy.survivors=2", "run.timeout=60", "run.min_clients=2", out="two")
    house.in_training("south", 1)
    waits = house.part("south", "clients.serve")
    os.kill(waits, signal.SIGSTOP)  # the round waits for it, while the others mask
    wait_for(lambda: masked(house, "north", 1) and masked(house, "east", 1), 200, "masked values")
    wait_for(lambda: house.ledger("north")[-1]["type"] == "COMMIT", 60, "its reply")
    time.sleep(3)
    house.processes["north"].kill()
    house.processes["north"].wait()
    os.kill(waits, signal.SIGCONT)
    assert process.wait(600) == 0, house.said("two")
    first, second = house.rounds("two")
    assert (first["clients"], first["released"]) == (list(NAMES), True)
    assert (second["clients"], second["released"]) == (["east", "south"], True)
    assert house.check("two")["unreleased_rounds"] == 0


def test_where_all_are_needed_one_that_is_killed_before_it_masks_is_asked_again(house: House):
    """And charged again, for one of the two rounds that it may join: the second lacks it, and releases nothing."""
    if house.processes["north"].poll() is not None:
        house.start("north")
    process = house.run(*SHARED, "privacy.survivors=3", "run.timeout=60", "run.min_clients=3", out="three")
    house.in_training("north", 1)
    os.kill(house.part("north", "clients.serve"), signal.SIGKILL)
    assert process.wait(600) == 0, house.said("three")
    first, second = house.rounds("three")
    assert (first["clients"], first["released"]) == (list(NAMES), True)
    assert (second["clients"], second["released"]) == (["east", "south"], False)
    assert house.check("three")["unreleased_rounds"] == 1
    run = house.ledger("north")[-1]["run"]
    kinds = [line["type"] for line in house.ledger("north") if line["run"] == run]
    assert (kinds.count("CHARGE"), kinds.count("COMMIT")) == (2, 1)
