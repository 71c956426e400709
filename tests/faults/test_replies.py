"""Replies that are corrupt, too large, replayed or another's: their client is left out of the round, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedlab.protocol import Frame, decode, encode
from fedlab.protocol.messages import REPLIES


def other_bytes(frame: Frame, kept: list[Frame]) -> Frame:
    return replace(frame, body=frame.body[:-8] + bytes(8))


def cut_off(frame: Frame, kept: list[Frame]) -> Frame:
    return replace(frame, header=frame.header[: len(frame.header) // 2])


def too_large(frame: Frame, kept: list[Frame]) -> Frame:
    return replace(frame, body=frame.body + bytes(2**22))


def replayed(frame: Frame, kept: list[Frame]) -> Frame:
    return kept[0]


def of_another(frame: Frame, kept: list[Frame]) -> Frame:
    reply: Any = decode(frame, REPLIES)
    (mine,) = reply.clients
    return encode("train", replace(reply, clients=(replace(mine, client="north"),)))


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (other_bytes, "unusable update: its ledger does not commit the update that it sent"),
        (cut_off, "malformed reply: header: "),
        (too_large, "malformed reply: body: "),
        (replayed, "ledger of south, line 5 does not follow the line before it"),
        (of_another, "its node's reply does not name it"),
    ],
)
def test_a_reply_that_is_not_what_was_committed_leaves_its_client_out_and_charged(
    tamper: Callable[[Frame, list[Frame]], Frame], said: str, sites: Callable[..., Any]
):
    world, kept = sites("north", "south"), []

    def fault(asked: Any) -> Frame:
        reply = asked.answer()
        if asked.site.name == "south" and asked.kind == "train":
            kept.append(reply)
            return tamper(reply, kept) if asked.round == 2 else reply
        return reply

    world.fault = fault
    result = world.run("run.rounds=3").result
    assert result["status"] == "completed"
    first, second, third = world.excluded()
    assert (first, third) == ({}, {})
    assert list(second) == ["south"]
    assert said in second["south"]
    assert world["south"].kinds().count("CHARGE") == 3
    world.check_nothing_is_lost()


def test_a_message_that_comes_twice_is_answered_twice_with_the_same_bytes_and_charged_once(sites: Callable[..., Any]):
    world, answers = sites("north"), []

    def fault(asked: Any) -> Frame:
        if asked.kind == "train":
            answers.extend([asked.answer(), asked.answer()])
            return answers[-1]
        return asked.answer()

    world.fault = fault
    assert world.run("run.rounds=1").result["status"] == "completed"
    assert answers[0].body == answers[1].body
    assert world["north"].kinds() == ["PLAN", "CHARGE", "COMMIT", "RELEASE", "CLOSE"]
    world.check_nothing_is_lost()


def test_a_request_that_was_cut_off_is_answered_with_a_code_and_costs_nothing(sites: Callable[..., Any]):
    world = sites("north", "south")

    def fault(asked: Any) -> Frame:
        if (asked.site.name, asked.kind, asked.round) == ("south", "train", 2):
            asked.frame = replace(asked.frame, body=asked.frame.body[:100])
        return asked.answer()

    world.fault = fault
    assert world.run().result["status"] == "completed"
    assert world.excluded()[1] == {"south": "node failed: request: the request does not fit the run; its log says why"}
    assert world["south"].kinds().count("CHARGE") == 1
    world.check_nothing_is_lost()
