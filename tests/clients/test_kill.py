"""SIGKILL at every point of charge → train → commit → release: never less recorded than released.

A forked child runs the real ``answer_train`` for two rounds on real data; the n-th system call or training step it
passes kills it (before it, after it, or half-way through a write). What the outside world got is a file that the child
appends to once a reply is complete.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.account import ClientAccount
from clients.node import Node
from clients.train import answer_train
from fedlab.config import RunConfig
from fedlab.lora.state import digest, from_wire
from fedlab.privacy.accounting import epsilon
from fedlab.privacy.ledger.keys import load_or_create_key
from fedlab.privacy.ledger.ledger import Ledger, check_chain, events, parse_lines
from fedlab.privacy.plan import DPPlan
from fedlab.protocol.messages import TrainRequest
from fedlab.session import Session, open_session


class Killer:
    """Counts points; at the chosen one the process is gone."""

    def __init__(self, fatal: int) -> None:
        self.fatal, self.passed = fatal, 0

    def point(self) -> bool:
        """Whether this point is the fatal one."""
        self.passed += 1
        return self.passed == self.fatal

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a point before it and one after it."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.point():
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if self.point():
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def torn(self, write: Callable[[int, bytes], int]) -> Callable[[int, bytes], int]:
        """``os.write`` with a third point: half of it is written."""
        around = self.around(write)

        def wrapped(descriptor: int, data: bytes) -> int:
            if self.point():
                write(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return around(descriptor, data)

        return wrapped


def cycle(node: Node, request: TrainRequest, released: Path, killer: Killer) -> None:
    """Two rounds in this process; what a server would have received is a line in ``released``."""
    os.write, os.fsync = killer.torn(os.write), killer.around(os.fsync)  # type: ignore[assignment]
    DPPlan.privatise = killer.around(DPPlan.privatise)  # type: ignore[method-assign]
    send = killer.around(lambda text: released.open("a").write(text))
    for number in (1, 2):
        text = ""
        for reply in answer_train(node, replace(request, round=number)).clients:
            update = reply.release("update")
            assert update is not None, reply.failure
            text += f"{reply.client} {digest(from_wire(update.arrays))}\n"
        send(text)


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a forked child that does the work: 0, or −9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def session(tiny_toml: str) -> Session:
    torch.set_num_threads(1)
    return open_session(RunConfig.parse(tiny_toml, ["privacy.noise=secure", "train.steps=2"]).to_toml())


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["alone", "in one pass"])
def test_a_kill_anywhere_never_leaves_less_recorded_than_released(
    size: int, session: Session, tmp_path: Path, helpers: Any
):
    cohort = [f"client-{i}" for i in range(size)]
    points, finished = 0, False
    while not finished:
        points += 1
        folder = tmp_path / str(points)
        folder.mkdir()
        released = folder / "released"
        node, request = helpers.simulated_node(session, folder), helpers.train_request(session, cohort)
        for client in cohort:
            ClientAccount(session, node.owners.one(client), request.run).sign()
        status = in_child(
            lambda node=node, request=request, released=released, fatal=points: cycle(
                node, request, released, Killer(fatal)
            )
        )
        assert status in (0, -signal.SIGKILL), f"point {points}: the child failed by itself"
        finished = status == 0

        lines = [line.split() for line in released.read_text().splitlines()] if released.is_file() else []
        for client in cohort:
            plan, sent = session.plan(client), [out for name, out in lines if name == client]
            assert plan is not None
            account = ClientAccount(session, node.owners.one(client), request.run)
            key = load_or_create_key(folder / "keys" / f"{client}.pem")
            reopened = Ledger(folder / f"{client}.jsonl", client, account.guard.ledger.dataset, key)
            with reopened.locked():  # the dead process' lock is gone, and a torn line with it
                recorded = events(reopened.entries)
            assert len(recorded) >= len(sent), (
                f"point {points}: {len(sent)} updates left, {len(recorded)} charges recorded"
            )
            assert epsilon(recorded, plan.delta) >= epsilon([plan.event()] * len(sent), plan.delta)
            outs = {e["out"] for e in reopened.entries if e["type"] == "COMMIT"}
            assert set(sent) <= outs, "what left was committed first"
            with account.guard.charge(account.terms, 3, "0" * 64) as commit:  # and it goes on from there
                commit(2, "f" * 64)
            check_chain(parse_lines(reopened.path.read_text()), client, reopened.public)
    assert points - 1 >= 30 * size - 10, f"only {points - 1} points"
    assert len(lines) == 2 * size, "an undisturbed cycle releases both rounds"
