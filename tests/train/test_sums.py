"""What clients add to a sum: in one pass as by themselves, whoever shares it, and what one step of DP-SGD sums."""

from __future__ import annotations

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.lora.state import State
from fedlab.models.adapters import initial_state
from fedlab.privacy.plan import DPPlan
from fedlab.seeds import random_stream
from fedlab.session import Session, open_session
from fedlab.train.dp import PerExampleGradients
from fedlab.train.local import LocalTraining, Summed
from fedlab.train.opacus import OpacusGradients
from fedlab.train.sums import sum_client, sum_clients

CLIENTS = ["client-0", "client-1", "client-2"]
PARTS = {"B and head": ("lora_B", "head"), "both and head": ("lora_A", "lora_B", "head"), "A": ("lora_A",)}


def session_of(toml: str, *overrides: str) -> Session:
    return open_session(RunConfig.parse(toml, overrides).to_toml())


def moved_state(session: Session) -> State:
    g = torch.Generator().manual_seed(0)
    start = initial_state(session.model, session.config.lora, 0)
    return {n: v + 0.2 * torch.randn(v.shape, generator=g) for n, v in start.items()}


def names_of(state: State, parts: tuple[str, ...]) -> list[str]:
    return [n for n in state if n.endswith(parts) or ("head" in parts and n.startswith("head."))]


def plan_of(session: Session, client: str, batch_size: int = 12, clip: float = 0.3) -> DPPlan:
    size = session.data.size(client)
    return DPPlan(size, batch_size, 1, 1.0, clip, 1e-5, 3, "seeded")


def compare(session: Session, members: list[LocalTraining], names: list[str], **hooks) -> dict[str, Summed]:
    """Both ways: the sums agree relative to each client's own, everything that is counted is equal."""
    model, data, config = session.model, session.data, session.config
    found = sum_clients(model, data, members, names, config, 2)
    assert list(found) == [m.client for m in members]
    for m in members:
        mine, alone = found[m.client], sum_client(model, data, m, names, config, 2, **hooks)
        assert {n: v.shape for n, v in mine.sums.items()} == {n: m.state[n].shape for n in names}
        assert all(v.dtype == torch.float64 for v in mine.sums.values())
        error = sum(float((mine.sums[n] - alone.sums[n]).square().sum()) for n in names) ** 0.5
        assert error <= 1e-5 * sum(float(v.square().sum()) for v in alone.sums.values()) ** 0.5
        assert (mine.examples, mine.steps) == (alone.examples, alone.steps) == (data.size(m.client), 1)
        assert mine.clip_fraction == pytest.approx(alone.clip_fraction, nan_ok=True)
        assert mine.loss == pytest.approx(alone.loss, rel=1e-5, nan_ok=True)
    return found


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
def test_equal_to_one_client_at_a_time(
    model: str, parts: str, tiny_toml: str, tiny_bert, request: pytest.FixtureRequest
):
    toml = tiny_toml.replace(str(tiny_bert), str(request.getfixturevalue(model)))
    session = session_of(toml, "lora.target_modules='all-linear'", "lora.dropout=0.2", "train.physical_batch=7")
    state = moved_state(session)
    found = compare(
        session, [LocalTraining(c, state, plan_of(session, c)) for c in CLIENTS], names_of(state, PARTS[parts])
    )
    assert all(0 < s.clip_fraction <= 1 for s in found.values())


def test_equal_to_opacus(tiny_toml: str):
    session = session_of(tiny_toml)
    state = moved_state(session)
    members = [LocalTraining(c, state, plan_of(session, c)) for c in CLIENTS]
    compare(session, members, names_of(state, ("lora_B", "head")), per_example=OpacusGradients)


def test_a_lower_rank_is_zero_beyond_its_own(tiny_toml: str):
    session = session_of(tiny_toml)
    state = moved_state(session)
    ranks = dict(zip(CLIENTS, (None, 2, 3), strict=True))
    members = [LocalTraining(c, state, plan_of(session, c), rank) for c, rank in ranks.items()]
    found = compare(session, members, names_of(state, ("lora_A", "lora_B", "head")))
    for client, rank in ranks.items():
        for name, value in found[client].sums.items():
            if rank is not None and name.endswith("lora_B"):
                assert not value[:, rank:].any()
                assert value[:, :rank].any()
            if rank is not None and name.endswith("lora_A"):
                assert not value[rank:].any()


def test_a_client_s_sum_is_within_the_clip_of_each_of_its_examples(tiny_toml: str):
    session = session_of(tiny_toml)
    state, clip = moved_state(session), 1e-3
    members = [LocalTraining(c, state, plan_of(session, c, clip=clip)) for c in CLIENTS]
    found = compare(session, members, names_of(state, ("lora_B", "head")))
    for m in members:
        drawn = len(m.plan.batch(random_stream(session.config.run.seed, "batches", m.client, 2)))
        norm = sum(float(v.square().sum()) for v in found[m.client].sums.values()) ** 0.5
        assert 0 < norm <= clip * drawn
        assert found[m.client].clip_fraction == 1


def test_an_empty_batch_adds_nothing(tiny_toml: str):
    session = session_of(tiny_toml)
    state = moved_state(session)
    plans = {c: plan_of(session, c, 1 if c == "client-1" else 12) for c in CLIENTS}
    for seed in range(200):  # a run whose second client draws nobody
        config = RunConfig.parse(session.config.to_toml(), [f"run.seed={seed}"])
        if not len(plans["client-1"].batch(random_stream(config.sampling_seed, "batches", "client-1", 2))):
            break
    session = Session(config, session.model, session.data)
    names = names_of(state, ("lora_B", "head"))
    found = compare(session, [LocalTraining(c, state, plans[c]) for c in CLIENTS], names)
    assert not any(bool(value.any()) for value in found["client-1"].sums.values())
    alone = sum_clients(
        session.model, session.data, [LocalTraining("client-1", state, plans["client-1"])], names, config, 2
    )
    assert not any(bool(value.any()) for value in alone["client-1"].sums.values())
    assert found["client-1"].steps == 1, "an empty batch is a step like any other"


def test_a_gradient_that_is_not_finite_adds_nothing(tiny_toml: str):
    session = session_of(tiny_toml)
    state = moved_state(session)
    state["head.bias" if "head.bias" in state else next(n for n in state if n.startswith("head."))].fill_(float("nan"))
    members = [LocalTraining(c, state, plan_of(session, c)) for c in CLIENTS]
    found = sum_clients(session.model, session.data, members, names_of(state, ("lora_B",)), session.config, 2)
    assert all(not bool(value.any()) for s in found.values() for value in s.sums.values())


def test_a_plan_of_one_step_and_one_clip_is_asked_for(tiny_toml: str):
    session = session_of(tiny_toml)
    state = moved_state(session)
    names = names_of(state, ("lora_B",))

    def run(members: list[LocalTraining]) -> None:
        sum_clients(session.model, session.data, members, names, session.config, 1)

    with pytest.raises(ValueError, match="one step"):
        run([LocalTraining("client-0", state)])
    with pytest.raises(ValueError, match="one clip"):
        run([LocalTraining(c, state, plan_of(session, c, clip=0.1 + i)) for i, c in enumerate(CLIENTS)])


@pytest.mark.parametrize("per_example", [PerExampleGradients, OpacusGradients])
def test_a_tensor_that_is_named_twice_is_summed_once(tiny_toml: str, per_example: type[PerExampleGradients]):
    session = session_of(tiny_toml)
    state = moved_state(session)
    names = names_of(state, ("lora_B", "head"))
    member = LocalTraining("client-0", state, plan_of(session, "client-0"))
    model, data, config = session.model, session.data, session.config
    once = sum_client(model, data, member, names, config, 2, per_example)
    twice = sum_client(model, data, member, names * 2, config, 2, per_example)
    assert all(torch.equal(once.sums[name], twice.sums[name]) for name in names), "its sensitivity would be 2C"
