"""A run whose server is killed and resumed, with the clients that are there by then."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fedlab.protocol import Frame
from strategies.server.accounts import Accounts
from strategies.server.loop import Rounds


class Gone(BaseException):
    """The server's process, which writes nothing down any more."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A run that is killed at a step of a round, and leaves what was on the disk."""

    def kill(world: Any, where: str, number: int, *overrides: str) -> None:
        owner = Accounts if hasattr(Accounts, where) else Rounds
        real = getattr(owner, where)

        def die(self: Any, *args: Any, **kwargs: Any) -> Any:
            done = [line for line in world.asked if line[1] == "train" and line[2] == number]
            if done:
                raise Gone
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, where, die)
            patch.setattr("strategies.app._leave", lambda *args: None)
            with pytest.raises(Gone):
                world.run(*overrides)
        assert not (world.path / "result.json").is_file()

    return kill


@pytest.mark.parametrize("where", ["settle", "close_round", "_checkpoint"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_run_goes_on_and_a_round_that_was_answered_costs_nothing_again(
    where: str, number: int, sites: Callable[..., Any], killed: Callable[..., None]
):
    world = sites("north", "south")
    killed(world, where, number, "run.min_clients=2")
    result = world.resume().result
    assert (result["status"], result["rounds"]) == ("completed", 2)
    assert world.excluded()[-1] == {}
    for site in world.sites:
        assert site.kinds().count("CHARGE") == 2
    world.check_nothing_is_lost()


def test_a_client_that_does_not_come_back_stays_in_the_account_of_the_run(
    sites: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    world = sites("north", "south")

    def fault(asked: Any) -> Frame:
        reply = asked.answer()
        if (asked.site.name, asked.kind, asked.round) == ("south", "train", 2):
            raise Gone  # the server, before it heard what south was charged
        return reply

    world.fault = fault
    with monkeypatch.context() as patch:
        patch.setattr("strategies.app._leave", lambda *args: None)
        with pytest.raises(Gone):
            world.run()
    world.there -= {"south"}
    result = world.resume().result
    assert result["status"] == "completed"
    assert "south took part before and is not here" in world.server_log
    assert world["south"].kinds().count("CHARGE") == 2
    assert result["clients"]["south"]["epsilon"] == result["clients"]["north"]["epsilon"], "it may have spent as much"
    assert len(result["clients"]["south"]["unseen"]) == 1
    assert result["epsilon"] == max(client["epsilon"] for client in result["clients"].values())
    world.check_nothing_is_lost()


def test_a_client_that_comes_back_later_is_counted_as_its_ledger_says(
    sites: Callable[..., Any], killed: Callable[..., None]
):
    world = sites("north", "south")
    killed(world, "settle", 1, "run.rounds=3")
    world.there -= {"south"}

    def fault(asked: Any) -> Frame:
        if asked.kind == "train":
            world.there.add("south")
        return asked.answer()

    world.fault = fault
    result = world.resume().result
    assert result["status"] == "completed"
    trained = [number for name, kind, number in world.asked if (name, kind) == ("south", "train")]
    assert trained == [1, 2, 3]
    assert "unseen" not in result["clients"]["south"]
    assert world["south"].kinds().count("CHARGE") == 3
    world.check_nothing_is_lost()


def test_trainers_that_were_started_again_meanwhile_know_the_run(
    sites: Callable[..., Any], killed: Callable[..., None]
):
    world = sites("north", "south")
    killed(world, "close_round", 2)
    for site in world.sites:
        site.start_again()
    assert world.resume().result["status"] == "completed"
    metrics = [json.loads(line) for line in (world.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in metrics if line["phase"] == "train"][-1] == 2
    world.check_nothing_is_lost()
