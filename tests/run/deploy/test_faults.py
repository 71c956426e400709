"""Real processes that are killed, hang, come late and come back: the run ends well, and nothing spent is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedlab.run.launch.deploy import certificates, keys

from .conftest import House, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
SLOW = ("train.steps=60", "train.physical_batch=4")  # a round that one can hit in its middle


@pytest.fixture(scope="module")
def make_house(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_data: Path) -> Callable[[str], House]:
    def make(toml: str) -> House:
        return House(tmp_path_factory.mktemp("house"), tiny_bert, tiny_data, toml)

    return make


@pytest.fixture
def house(houses: dict[str, House], make_house: Callable[[str], House], tiny_toml: str) -> Iterator[House]:
    """A server and two clients."""
    if not houses:
        houses["made"] = made = make_house(tiny_toml)
        made.serve()
        for number, name in enumerate(("north", "south")):
            made.join(name, number)
    yield houses["made"]
    houses["made"].end_runs()


def ended(house: House, process: subprocess.Popen[bytes], out: str, code: int = 0) -> None:
    assert process.wait(600) == code, house.said(out)


@pytest.mark.parametrize("part", ["clients.serve", "flower-supernode", "carrier"])
def test_a_part_of_a_client_killed_in_mid_round(part: str, house: House):
    out = part.replace(".", "-")
    process = house.run("run.rounds=3", "run.timeout=100", "privacy.participations=3", *SLOW, out=out)
    house.in_training("north", 2)
    os.kill(house.part("north", part), signal.SIGKILL)
    ended(house, process, out)
    result = house.check(out)
    assert (result["status"], result["rounds"]) == ("completed", 3)
    assert f"{part.replace('clients.serve', 'trainer')} was ended by SIGKILL; it starts again" in house.said("north")
    first, second, third = house.rounds(out)
    assert "north" in first["clients"]
    if part == "clients.serve":
        assert list(second["excluded"]) == ["north"]
    assert second["seconds"] < 100, "nobody waited for the deadline"
    assert "south" in third["clients"]


def test_the_server_s_parts_killed_in_mid_round(house: House):
    process = house.run("run.rounds=3", "run.timeout=200", *SLOW, out="server-killed")
    house.in_training("north", 2)
    os.kill(house.part("server", "flower-superlink"), signal.SIGKILL)
    wait_for(lambda: len(house.rounds("server-killed")) >= 2, 400, "the second round")
    house.processes["server"].kill()
    house.processes["server"].wait()
    time.sleep(3)
    house.serve()
    ended(house, process, "server-killed")
    result = house.check("server-killed")
    assert (result["status"], result["rounds"]) == ("completed", 3)


def test_a_client_that_hangs_is_left_out_and_comes_back(house: House):
    process = house.run("run.rounds=3", "run.timeout=25", "privacy.participations=3", *SLOW, out="hung")
    house.in_training("north", 2)
    trainer = house.part("north", "clients.serve")
    os.kill(trainer, signal.SIGSTOP)
    wait_for(lambda: len(house.rounds("hung")) >= 2, 400, "the second round")
    os.kill(trainer, signal.SIGCONT)
    ended(house, process, "hung")
    result = house.check("hung")
    assert result["status"] == "completed"
    assert house.rounds("hung")[1]["excluded"] == {"north": "no reply within 25 s"}


def test_a_run_that_was_killed_in_mid_round_goes_on_with_the_clients_that_are_there(house: House):
    process = house.run("run.rounds=3", *SLOW, out="run-killed")
    house.in_training("north", 2)
    process.kill()
    process.wait()
    assert house.fedlab("resume", "run-killed", out="resumed") == 0, house.said("resumed")
    result = house.check("run-killed")
    assert (result["status"], result["rounds"]) == ("completed", 3)
    assert house.fedlab("audit", "run-killed", out="audit") == 0


def test_a_client_whose_key_is_let_in_late_joins_and_one_that_was_killed_comes_back(house: House):
    process = house.run("run.rounds=6", "privacy.participations=6", "run.timeout=60", *SLOW, out="late")
    wait_for(lambda: len(house.rounds("late")) >= 1, 400, "a round")
    house.join("east", 2, let_in=False)
    wait_for(lambda: "does not know this node's key" in house.said("east"), 60, "a sentence")
    keys.add_node(house.folder / "keys", house.folder / "east.pub")
    house.processes["south"].kill()
    house.processes["south"].wait()
    house.start("south")
    ended(house, process, "late")
    result = house.check("late")
    assert result["status"] == "completed"
    lines = house.rounds("late")
    assert "east" not in lines[0]["clients"]
    assert {"east", "south"} <= {name for line in lines[2:] for name in line["clients"]}


def test_a_second_client_in_the_same_home_is_refused(house: House):
    code = house.begin("twice", sys.executable, "-m", "fedlab.cli", "client", "north.toml").wait(100)
    assert code == 2, house.said("twice")
    assert "another trainer listens at" in house.said("twice")


def test_an_expired_certificate_keeps_the_server_from_starting(house: House, tmp_path: Path):
    place = tmp_path / "keys"
    keys.init(place, ["localhost"])
    authority = certificates.read_certificate(place / "ca.crt").certificate
    ca_key, key = (certificates.read_private_key(place / name) for name in ("ca.key", "server.key"))
    past = datetime.now(UTC) - timedelta(days=20)
    made = certificates.make_server_certificate(authority, ca_key, key, ["localhost"], 10, past)
    (place / "server.crt").write_bytes(made)
    (tmp_path / "server.toml").write_text('[server]\naddress = "127.0.0.1:1"\n')
    done = subprocess.run(
        [sys.executable, "-m", "fedlab.cli", "server", str(tmp_path / "server.toml")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert "expired" in done.stderr
    assert "fedlab keys renew" in done.stderr
