"""What a node remembers of a run: the configuration, by its hash, in whatever process the next message arrives."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from clients.node import enter, join
from clients.owner import SimulatedOwners, SingleOwner
from fedlab.config import RunConfig
from fedlab.errors import FedlabError
from fedlab.lora.state import digest, to_wire
from fedlab.protocol import ProtocolError
from fedlab.protocol.messages import DescribeRequest, RunReference


@pytest.fixture
def request_of(tiny_toml: str, tmp_path: Path):
    def make(*overrides: str, **changes: object) -> DescribeRequest:
        text = RunConfig.parse(tiny_toml, overrides).to_toml()
        run = RunReference("a" * 32, hashlib.sha256(text.encode()).hexdigest(), ("head", "lora_B"))
        return replace(DescribeRequest(run, text, ("client-0",), str(tmp_path / "run")), **changes)

    return make


def test_later_requests_name_the_configuration_by_its_hash(request_of):
    memory: dict[str, str] = {}
    asked = request_of()
    joined = join(asked, memory, {})
    later = enter(asked.run, dict(memory), {})
    assert later.session is joined.session
    assert later.session.config.to_toml() == asked.configuration
    assert isinstance(later.owners, SimulatedOwners)


def test_a_configuration_that_never_came_is_refused(request_of):
    with pytest.raises(FedlabError, match="never came to this node"):
        enter(request_of().run, {}, {})


def test_another_configuration_than_was_announced_is_refused(request_of):
    memory: dict[str, str] = {}
    other = request_of("train.lr=0.1").configuration
    with pytest.raises(ProtocolError, match="its hash is"):
        join(request_of(configuration=other), memory, {})
    assert memory == {}


def test_a_node_with_an_owner_of_its_own_does_not_look_where_the_server_says(request_of, tmp_path: Path):
    node = {"client": "north", "ledger": str(tmp_path / "home")}
    joined = join(request_of(simulation="/the/server/says"), {}, node)
    assert isinstance(joined.owners, SingleOwner)
    assert joined.owners.one("north").places.ledgers == tmp_path / "home"


def test_what_stays_as_it_is_must_be_what_was_announced(request_of, tiny_bert: Path):
    import torch

    asked = request_of()
    basis = {"x.lora_A": torch.ones(2, 3)}
    memory: dict[str, str] = {}
    wrong = replace(asked, run=replace(asked.run, basis="0" * 64), basis=to_wire(basis))
    with pytest.raises(ProtocolError, match="not the one that was announced"):
        join(wrong, memory, {})
    right = replace(asked, run=replace(asked.run, basis=digest(basis)), basis=to_wire(basis))
    assert torch.equal(join(right, memory, {}).session.basis["x.lora_A"], basis["x.lora_A"])
    assert torch.equal(enter(right.run, memory, {}).session.basis["x.lora_A"], basis["x.lora_A"])
