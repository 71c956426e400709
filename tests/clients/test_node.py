"""What a node remembers of a run: the configuration, by its hash, in whatever process the next message arrives."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from clients.app import SimulatedDesk
from clients.node import Memory, Node, enter, owners_of
from clients.owner import SimulatedOwners
from fedlab.config import RunConfig
from fedlab.lora.state import digest, to_wire
from fedlab.protocol import ProtocolError
from fedlab.protocol.fields import RunReference
from fedlab.protocol.messages import DescribeRequest, ReceiptsRequest, Request


def arrive(request: Request, memory: Memory) -> Node:
    """A request at a node of a simulation."""
    return enter(request, owners_of(request, memory), memory)


def later(asked: DescribeRequest) -> ReceiptsRequest:
    """A request that names its configuration by the hash; it concerns nobody."""
    return ReceiptsRequest(asked.run, ())


@pytest.fixture
def request_of(tiny_toml: str, tmp_path: Path):
    def make(*overrides: str, **changes: object) -> DescribeRequest:
        text = RunConfig.parse(tiny_toml, overrides).to_toml()
        run = RunReference("a" * 32, hashlib.sha256(text.encode()).hexdigest(), ("head", "lora_B"))
        (tmp_path / "run" / "ledger").mkdir(parents=True, exist_ok=True)
        return replace(DescribeRequest(run, text, ("client-0",), str(tmp_path / "run")), **changes)

    return make


def test_later_requests_name_the_configuration_by_its_hash(request_of):
    memory: dict[str, str] = {}
    asked = request_of()
    joined = arrive(asked, memory)
    found = arrive(later(asked), dict(memory))
    assert found.session is joined.session
    assert found.config.to_toml() == asked.configuration
    assert isinstance(found.owners, SimulatedOwners)


def test_a_configuration_that_never_came_is_refused(request_of):
    with pytest.raises(ProtocolError, match="never came here"):
        arrive(later(request_of()), {})


def test_another_configuration_than_was_announced_is_refused(request_of):
    memory: dict[str, str] = {}
    other = request_of("train.lr=0.1").configuration
    with pytest.raises(ProtocolError, match="its hash is"):
        arrive(request_of(configuration=other), memory)
    assert memory == {}


def test_a_memory_that_does_not_hold_what_its_names_say_is_not_used(request_of):
    asked, other = request_of(), request_of("train.lr=0.1")
    with pytest.raises(ProtocolError, match="its hash is"):
        arrive(later(asked), {asked.run.configuration: other.configuration, "simulation": ""})


def test_a_run_has_one_configuration(request_of):
    memory: dict[str, str] = {}
    arrive(request_of(), memory)
    arrive(request_of("train.lr=0.1"), memory)
    assert sorted(memory) == sorted([request_of("train.lr=0.1").run.configuration, "simulation"])


@pytest.mark.parametrize("node", [{}, {"partition-id": 0, "num-partitions": 2}, {"simulated": "true"}])
def test_no_message_makes_a_node_one_of_a_simulation(node: dict, request_of):
    with pytest.raises(ProtocolError, match="this node is none of a simulation"):
        SimulatedDesk({}, node).owners(request_of())


def test_what_stays_as_it_is_must_be_what_was_announced(request_of, tiny_bert: Path):
    import torch

    asked = request_of()
    basis = {"x.lora_A": torch.ones(2, 3)}
    memory: dict[str, str] = {}
    wrong = replace(asked, run=replace(asked.run, basis="0" * 64), basis=to_wire(basis))
    with pytest.raises(ProtocolError, match="not the one that was announced"):
        arrive(wrong, memory)
    right = replace(asked, run=replace(asked.run, basis=digest(basis)), basis=to_wire(basis))
    assert torch.equal(arrive(right, memory).session.basis["x.lora_A"], basis["x.lora_A"])
    assert torch.equal(arrive(later(right), memory).session.basis["x.lora_A"], basis["x.lora_A"])
