"""The release at a task's end, asked by a hostile server: one charge, one output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlab.config import RunConfig
from fedlab.lora.state import digest, part_of, to_wire
from fedlab.protocol.messages import ClientOrder, DescribeRequest, GramRequest, ReceiptFor, ReceiptsRequest
from fedlab.protocol.sum_messages import SumOrder
from fedlab.run.launch import prepared
from fedlab.session import open_session
from strategies import STRATEGIES
from strategies.server.task_start import first_state


@pytest.fixture
def asked(
    server: Callable[..., Any],
    stream_toml: str,
    stream_data: Path,
    tiny_data: Path,
    tiny_bert: Path,
    tiny_sentence_encoder: Path,
    helpers: Any,
) -> tuple[Any, GramRequest]:
    """A server whose task the client takes part in, and its request at the task's end."""
    changes = {
        str(tiny_data): str(stream_data),
        str(tiny_bert): str(tiny_sentence_encoder),
        'trained = ["lora_B", "head"]': "",
    }
    hostile = server(changes)
    overrides = ["privacy={unit='example', sigma=2.0, clip=1.0, noise='secure'}", "data.min_client_size=2"]
    config = prepared(RunConfig.parse(stream_toml, overrides)).at_stage(0, None)
    strategy = STRATEGIES[config.strategy.name](config, open_session(config.to_toml()).model)
    state, _ = first_state(config, strategy, open_session(config.to_toml()))
    basis = {name: value for name, value in state.items() if part_of(name) in strategy.static}
    run = dataclasses.replace(
        helpers.reference(config),
        parts=tuple(strategy.trained_parts(config)),
        basis=digest(basis) if basis else "",
    )
    request = DescribeRequest(run, config.to_toml(), (helpers.CLIENT,), "", to_wire(basis))
    assert helpers.codes_of(hostile.send(request)) == [], hostile.log
    order = (ClientOrder(helpers.CLIENT, 0, 1),)
    return hostile, GramRequest(run, order, None, to_wire(strategy.travelling(state)))


def test_the_release_at_a_tasks_end_asked_again_gives_the_same_bytes_for_one_charge(
    asked: tuple[Any, GramRequest], helpers: Any
):
    hostile, request = asked
    first = hostile.send(request)
    assert helpers.codes_of(first) == [], hostile.log
    assert first.sum.event is not None
    for order in (None, SumOrder("gram-0-0", {}), SumOrder("gram-0-1", {})):
        again = hostile.send(dataclasses.replace(request, sum=order))
        assert all(np.array_equal(value, again.sum.arrays[name]) for name, value in first.sum.arrays.items())
    assert hostile.kinds() == ["PLAN", "PLAN", "CHARGE", "COMMIT"]


def test_a_task_that_was_closed_keeps_no_answer(asked: tuple[Any, GramRequest], helpers: Any):
    hostile, request = asked
    hostile.send(request)
    assert (
        helpers.codes_of(hostile.send(ReceiptsRequest(request.run, (ReceiptFor(helpers.CLIENT, 0, ""),), True))) == []
    )
    assert not list((hostile.home / "ledger" / "kept").iterdir())
    assert helpers.codes_of(hostile.send(request)) == ["repeated"]


def test_another_state_at_a_tasks_end_is_refused(asked: tuple[Any, GramRequest], helpers: Any):
    hostile, request = asked
    hostile.send(request)
    other = {name: array + np.float32(0.5) for name, array in request.state.items()}
    assert helpers.codes_of(hostile.send(dataclasses.replace(request, state=other))) == ["repeated"]
    assert len(hostile.outputs) == 1
