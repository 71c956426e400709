"""Clients on machines of their own under shared noise: one of three is gone, at every step of a round."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from clients.owner import own_identity
from fedlab.config.client import ClientFile
from fedlab.errors import RunFailed
from fedlab.protocol import decode
from fedlab.protocol.messages import REPLIES, REQUESTS
from fedlab.run.checkpoint import load_checkpoint
from fedlab.run.directory import RunDirectory

SHARED = ("train.steps=1", "train.sampling_rate=0.2", "train.momentum=0", "privacy.sigma=1.0")
TWO = (*SHARED, "privacy.survivors=2", "run.min_clients=2")
THREE = (*SHARED, "privacy.survivors=3", "run.min_clients=2")


@pytest.fixture
def peers(sites: Callable[..., Any]) -> Any:
    """Three clients that know each other's keys and allow shared noise."""
    world = sites()
    world.retries = 0
    roster = {site.name: own_identity(site.file) for site in world.sites}
    for site in world.sites:
        tree = json.loads(site.file.model_dump_json())
        tree["policy"]["shared_noise"] = True
        tree["roster"] = roster
        site.file = ClientFile.model_validate_json(json.dumps(tree))
        site.start_again()
    return world


def gone(kind: str, number: int, faults: Any, name: str = "north") -> Callable[[Any], Any]:
    """Dies where it is asked this in a round, and is there again for the next message."""

    def fault(asked: Any) -> Any:
        request = decode(asked.frame, REQUESTS)
        now = getattr(request, "round", 0) or int(getattr(request, "name", "-0").split("-")[1] or 0)
        if (asked.site.name, asked.kind, now) == (name, kind, number):
            raise faults.Killed
        return asked.answer()

    return fault


def released(world: Any) -> list[tuple[list[str], bool]]:
    lines = [json.loads(line) for line in (world.path / "metrics.jsonl").read_text().splitlines()]
    return [(line["clients"], line["released"]) for line in lines if line["phase"] == "train"]


ALL = ["east", "north", "south"]


def test_a_run_goes_to_its_end_in_two_exchanges_a_round(peers: Any):
    result = peers.run(*THREE).result
    assert (result["status"], released(peers)) == ("completed", [(ALL, True)] * 2)
    kinds = [kind for name, kind, _ in peers.asked if name == "north" and kind not in ("describe", "receipts")]
    assert kinds == ["prepare", "train", "unmask", "train", "unmask"]
    peers.check_nothing_is_lost()


@pytest.mark.parametrize("kind", ["train", "unmask"])
def test_with_two_needed_a_round_that_loses_one_completes(kind: str, peers: Any, faults: Any):
    """At ``unmask`` it is killed between masking and unmasking: its share is in the sum."""
    peers.fault = gone(kind, 1, faults)
    assert peers.run(*TWO).result["status"] == "completed"
    assert released(peers) == [(["east", "south"] if kind == "train" else ALL, True), (ALL, True)]
    peers.check_nothing_is_lost()


@pytest.mark.parametrize("kind", ["train", "unmask"])
def test_with_three_needed_it_releases_nothing_or_completes_with_those_that_masked(kind: str, peers: Any, faults: Any):
    peers.fault = gone(kind, 1, faults)
    result = peers.run(*THREE).result
    assert result["status"] == "completed"
    first = (["east", "south"], False) if kind == "train" else (ALL, True)
    assert released(peers) == [first, (ALL, True)]
    assert result["unreleased_rounds"] == (1 if kind == "train" else 0)
    peers.check_nothing_is_lost()


def test_what_nobody_unmasks_is_not_released(peers: Any, faults: Any):
    def fault(asked: Any) -> Any:
        if asked.kind == "unmask" and decode(asked.frame, REQUESTS).name.startswith("round-1-"):
            raise faults.Killed
        return asked.answer()

    peers.fault = fault
    assert peers.run(*TWO).result["unreleased_rounds"] == 1
    assert released(peers) == [(ALL, False), (ALL, True)]
    peers.check_nothing_is_lost()


def test_a_server_that_is_killed_in_mid_round_loses_it_and_goes_on(
    peers: Any, faults: Any, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("strategies.server.shared_round.SumMessenger.finish", _killed)
        with pytest.raises(RunFailed):
            peers.run(*TWO)
    result = peers.resume().result
    assert (result["status"], result["unreleased_rounds"]) == ("completed", 1)
    assert [done for _, done in released(peers)] == [False, True]
    kept = load_checkpoint(RunDirectory.open(peers.path))
    assert kept is not None
    assert kept[3]["participations"] == dict.fromkeys(ALL, 2), "of a round that was lost, each has its charge"
    peers.check_nothing_is_lost()


def _killed(self: Any, number: int, outcome: Any) -> None:
    raise RuntimeError("made up")


def test_what_travels_of_one_client_looks_like_noise(peers: Any):
    """What the server gets of one client has as many ones as zeros in every bit."""
    import numpy as np

    seen: list[np.ndarray] = []

    def fault(asked: Any) -> Any:
        frame = asked.answer()
        if asked.kind == "train":
            (value, *_) = decode(frame, {"train": REPLIES["train"]}).sum.arrays.values()
            seen.append(np.array(value).ravel())
        return frame

    peers.fault = fault
    peers.run(*TWO, "run.rounds=1")
    bits = np.unpackbits(np.concatenate(seen).view(np.uint8)).reshape(-1, 64)
    share = bits.mean(0)
    assert len(seen) == 3
    assert np.abs(share - 0.5).max() < 5 * 0.5 / len(bits) ** 0.5


def test_a_peer_that_is_not_in_the_roster_is_refused(peers: Any):
    """A server that invents a client gets nothing of the others."""
    south = peers["south"]
    tree = json.loads(south.file.model_dump_json())
    del tree["roster"]["north"]
    south.file = ClientFile.model_validate_json(json.dumps(tree))
    south.start_again()
    with pytest.raises(RunFailed, match="3 rounds one after another"):
        peers.run(*THREE, "run.rounds=3")
    assert "CHARGE" not in south.kinds()
    assert "north is not in this client's [roster]" in south.log


def test_a_client_whose_policy_says_nothing_of_it_takes_no_part(sites: Callable[..., Any]):
    world = sites()
    with pytest.raises(Exception, match="policy"):
        world.run(*TWO)
    assert all("CHARGE" not in site.kinds() for site in world.sites)
