"""The release at a task's end: the clipped sums of a client's texts, and noise that no other client has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.account import ClientAccount
from clients.gram import answer_gram
from fedlab.config import RunConfig
from fedlab.continual.input_grams import input_grams, input_groups
from fedlab.continual.sketch import from_fixed
from fedlab.lora.state import to_wire
from fedlab.models.adapters import initial_state
from fedlab.protocol.messages import ClientOrder, GramRequest
from fedlab.run.launch import prepared
from fedlab.session import Session, open_session


@pytest.fixture
def session(stream_toml: str) -> Session:
    overrides = ["privacy={unit='example', sigma=1.0, clip=1.0}", "strategy.gram={sigma=2.0, clip=0.5}"]
    return open_session(prepared(RunConfig.parse(stream_toml, overrides)).at_stage(0, None).to_toml())


def test_the_noises_of_two_clients_are_not_one_and_the_same(session: Session, tmp_path: Path, helpers: Any):
    node, run = helpers.simulated_node(session, tmp_path), helpers.run_reference(session)
    state = initial_state(session.model, session.config.lora, 0)
    noises = [noise_of(client, node, run, state, session) for client in ("client-0", "client-1")]
    for name, mine in noises[0].items():
        upper = torch.triu(torch.ones_like(mine)) > 0
        assert float(mine[upper].std()) == pytest.approx(2.0 * 0.5, rel=0.15)
        both = torch.stack([mine[upper], noises[1][name][upper]])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.2


def noise_of(client: str, node: Any, run: Any, state: dict[str, Tensor], session: Session) -> dict[str, Tensor]:
    """What a client released, less what its texts amount to."""
    ClientAccount(session, node.owners.one(client), run).sign()
    reply = answer_gram(node, GramRequest(run, (ClientOrder(client, 0, 1),), None, to_wire(state)))
    assert reply.clients[0].failure is None
    assert reply.sum is not None
    session.model.load(state)
    groups, size = input_groups(session.model), session.config.train.physical_batch
    clean = input_grams(session.model, session.data, session.data.train(client), groups, 0.5, size)
    return {name: value - clean[name] for name, value in from_fixed(reply.sum.arrays).items()}
