"""What makes a node one of a simulation: its own configuration, or being a process of Ray."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from fedlab.run.launch.simulated import simulated


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({}, False),
        ({"partition-id": 0, "num-partitions": 2}, False),
        ({"simulated": "true"}, False),
        ({"simulated": True}, True),
        ({"simulated": True, "client": "north"}, False),
    ],
)
def test_the_nodes_own_configuration_says_it(node: dict[str, object], expected: bool):
    assert simulated(node) is expected


@pytest.mark.parametrize(("actor", "expected"), [(None, False), ("a1", True)])
def test_under_flwr_run_being_an_actor_says_it(actor: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch):
    context = SimpleNamespace(get_actor_id=lambda: actor)
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert simulated({"partition-id": 0}) is expected
    assert simulated({"client": "north"}) is False
