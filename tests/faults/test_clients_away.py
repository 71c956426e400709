"""Clients that are killed, hang, come late, go, and come back: the run goes on, and nothing they spent is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from fedlab.errors import RunFailed
from fedlab.protocol.failures import explained


def dies(asked: Any, faults: Any) -> None:
    """Charge, and then nothing: no ABORT, no COMMIT, no reply, as after SIGKILL."""
    from clients.account import ClientAccount
    from clients.owner import own_owner
    from fedlab.lora.state import digest, from_wire
    from fedlab.protocol import decode
    from fedlab.protocol.messages import REQUESTS

    request = decode(asked.frame, REQUESTS)
    owner = own_owner(asked.site.file, request.run.run, asked.site.desk._sessions.open)
    text = asked.site.desk.memory(request.run.run)[request.run.configuration]
    account = ClientAccount(owner.open(text), owner.owner, request.run)
    received = digest(from_wire(request.state, request.wire))
    pid = os.fork()
    if pid == 0:  # a process of its own, which ends without a word
        held = account.guard.charge(account.terms, request.round, received)
        held.__enter__()
        os._exit(0)
    os.waitpid(pid, 0)
    raise faults.Killed


def test_a_trainer_killed_in_mid_round_costs_a_charge_and_the_round_goes_on(sites: Callable[..., Any], faults: Any):
    world = sites()

    def fault(asked: Any) -> Any:
        if (asked.site.name, asked.kind, asked.round) == ("north", "train", 1):
            dies(asked, faults)
        return asked.answer()

    world.fault = fault
    result = world.run("privacy.participations=2").result
    assert (result["status"], result["rounds"]) == ("completed", 2)
    assert world.excluded() == [{"north": f"node failed: {explained('failed')}"}, {}]
    assert world["north"].kinds() == ["PLAN", "CHARGE", "CHARGE", "COMMIT", "RELEASE", "CLOSE"]
    assert result["clients"]["north"]["epsilon"] == result["clients"]["south"]["epsilon"]
    world.check_nothing_is_lost()


def test_where_the_round_needs_it_a_killed_trainer_is_asked_again_and_charged_again(
    sites: Callable[..., Any], faults: Any
):
    world = sites("north", "south")

    def fault(asked: Any) -> Any:
        if (asked.site.name, asked.kind, asked.times) == ("north", "train", 1) and asked.round == 1:
            dies(asked, faults)
        return asked.answer()

    world.fault = fault
    result = world.run("run.min_clients=2", "run.rounds=1", "privacy.participations=1").result
    # its plan allows one round, and that is used: it refuses, and the run says that it is over
    assert result["status"] == "budget-exhausted"
    assert "participations" in result["clients"]["north"]["refused"]
    world.check_nothing_is_lost()


def test_a_client_that_hangs_past_the_deadline_stays_charged_and_its_late_work_is_not_wasted(
    sites: Callable[..., Any], faults: Any
):
    world = sites()

    def fault(asked: Any) -> Any:
        if (asked.site.name, asked.kind, asked.round) == ("south", "train", 1):
            asked.answer()  # it computes, commits, and answers after the deadline
            raise faults.Lost
        return asked.answer()

    world.fault = fault
    result = world.run("run.timeout=60").result
    assert result["status"] == "completed"
    assert world.excluded() == [{"south": "no reply within 60 s"}, {}]
    assert world["south"].kinds().count("CHARGE") == 2
    world.check_nothing_is_lost()


def test_a_client_that_never_answers_again_counts_as_charged_for_every_time_it_was_asked(
    sites: Callable[..., Any], faults: Any
):
    world = sites("north", "south")

    def fault(asked: Any) -> Any:
        if asked.site.name == "south" and asked.kind in ("train", "receipts"):
            if asked.kind == "train":
                dies_silently(asked, faults)
            raise faults.Lost
        return asked.answer()

    def dies_silently(asked: Any, faults: Any) -> None:
        try:
            dies(asked, faults)
        except faults.Killed:
            asked.site.start_again()

    world.fault = fault
    with pytest.raises(RunFailed, match=r"round 1: 1 usable updates, 2 needed \(south: no reply within"):
        world.run("run.min_clients=2", "run.timeout=60")
    assert world["south"].kinds().count("CHARGE") == 2, "it was asked twice, and died twice"
    assert world.result["status"] == "failed"
    assert len(world.result["clients"]["south"]["unseen"]) == 2
    world.check_nothing_is_lost()


def test_an_answer_that_was_lost_is_given_again_for_no_further_charge(sites: Callable[..., Any], faults: Any):
    world = sites("north", "south")

    def fault(asked: Any) -> Any:
        reply = asked.answer()
        if (asked.site.name, asked.kind, asked.times) == ("south", "train", 1):
            raise faults.Lost
        return reply

    world.fault = fault
    result = world.run("run.min_clients=2", "run.timeout=60").result
    assert (result["status"], result["rounds"]) == ("completed", 2)
    assert world["south"].kinds().count("CHARGE") == 2, "two rounds, each answered twice"
    assert world["south"].kinds().count("COMMIT") == 2
    world.check_nothing_is_lost()


def test_a_transport_that_was_started_again_lost_the_message_and_is_asked_again_at_once(
    sites: Callable[..., Any], faults: Any
):
    world = sites("north", "south")

    def fault(asked: Any) -> Any:
        if (asked.site.name, asked.kind, asked.times) == ("south", "train", 1):
            world.started["south"] = asked.round
            raise faults.Lost
        return asked.answer()

    world.fault, world.retries = fault, 0
    result = world.run().result
    assert world.excluded() == [{}, {}]
    assert result["status"] == "completed"
    assert world.clock.now < 1000, "nobody waited for the deadline of an hour"
    world.check_nothing_is_lost()


def test_what_a_node_was_fetching_while_the_server_was_away_is_sent_again(sites: Callable[..., Any], faults: Any):
    world = sites("north", "south")

    def fault(asked: Any) -> Any:
        if (asked.site.name, asked.kind, asked.times) == ("south", "train", 1):
            world.outages += 1
            raise faults.Lost
        return asked.answer()

    world.fault, world.retries = fault, 0
    assert world.run().result["status"] == "completed"
    assert world.excluded() == [{}, {}]
    assert world.clock.now < 1000, "nobody waited for the deadline of an hour"
    world.check_nothing_is_lost()


def test_a_node_that_was_shut_out_in_mid_run_is_left_out_with_the_reason(sites: Callable[..., Any], faults: Any):
    world = sites("north", "south")

    def fault(asked: Any) -> Any:
        if asked.kind == "receipts" and asked.site.name == "south":
            world.shut_out.add("south")
        return asked.answer()

    world.fault = fault
    assert world.run().result["status"] == "completed"
    assert "the server did not take the message for it: it was shut out" in world.excluded()[1]["south"]
    world.check_nothing_is_lost()


def test_a_late_joiner_takes_part_from_the_next_round_and_one_that_goes_comes_back(
    sites: Callable[..., Any], faults: Any
):
    world = sites()
    world.there -= {"east"}

    def fault(asked: Any) -> Any:
        if asked.kind == "train" and asked.site.name == "north":
            world.there |= {"east"}  # comes in the first round
            world.there ^= {"south"} if asked.round in (1, 2) else set()  # away in the second, back in the third
        return asked.answer()

    world.fault = fault
    result = world.run("run.rounds=3", "privacy.participations=3").result
    trained = [(name, number) for name, kind, number in world.asked if kind == "train"]
    assert [number for name, number in trained if name == "east"] == [2, 3]
    assert [number for name, number in trained if name == "south"] == [1, 3]
    assert result["status"] == "completed"
    assert set(result["clients"]) == {"east", "north", "south"}
    world.check_nothing_is_lost()


def test_a_run_waits_for_the_clients_it_needs_and_says_how_many_are_missing(sites: Callable[..., Any]):
    world = sites("north", "south")
    world.there -= {"south"}
    world.clock.at(60, lambda: world.there.add("south"))
    assert world.run("run.min_clients=2").result["status"] == "completed"
    world.check_nothing_is_lost()


def test_a_run_whose_clients_do_not_come_ends_with_a_sentence(sites: Callable[..., Any]):
    world = sites("north", "south")
    world.there.clear()
    with pytest.raises(RunFailed, match=r"0 clients are connected after 100 s, and 1 are needed .*fedlab resume"):
        world.run()
    world.there |= {"north", "south"}
    assert world.resume().result["status"] == "completed"
    world.check_nothing_is_lost()


def test_one_that_joins_and_never_says_who_it_is_keeps_the_others_waiting_for_seconds_only(
    sites: Callable[..., Any], faults: Any
):
    world = sites()
    world.there -= {"east"}

    def fault(asked: Any) -> Any:
        world.there |= {"east"} if asked.kind == "train" else set()
        if asked.site.name == "east":
            raise faults.Lost
        return asked.answer()

    world.fault = fault
    result = world.run("run.rounds=4", "privacy.participations=4").result
    assert (result["status"], result["rounds"]) == ("completed", 4)
    assert world.clock.now < 400, "not an hour in every round"
    assert [line for line in world.asked if line[0] == "east"] == [("east", "describe", 0)] * 2
    world.check_nothing_is_lost()


def test_a_trainer_that_is_starting_is_asked_again_who_it_is(sites: Callable[..., Any], faults: Any):
    world = sites("north")

    def fault(asked: Any) -> Any:
        if asked.kind == "describe" and world.clock.now < 50:
            raise faults.Killed
        return asked.answer()

    world.fault = fault
    assert world.run().result["status"] == "completed"
    assert world.server_log.count("takes no part: failed") == 1, "told once"
    world.check_nothing_is_lost()


def test_a_trainer_that_never_says_who_it_is_fails_the_run_with_its_reason(sites: Callable[..., Any], faults: Any):
    world = sites("north")

    def fault(asked: Any) -> Any:
        raise faults.Killed

    world.fault = fault
    with pytest.raises(RunFailed, match=r"0 clients take part after 100 s.*node 10: failed: it failed; its log"):
        world.run()
