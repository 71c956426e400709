"""Local training: what it returns, what it leaves behind, and what DP-SGD is against a slow reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlab.config import RunConfig
from fedlab.errors import RunFailed
from fedlab.lora.ranks import narrow
from fedlab.models.adapters import initial_state
from fedlab.privacy.plan import DPPlan
from fedlab.seeds import random_stream
from fedlab.session import Session, open_session
from fedlab.train.local import Trained
from fedlab.train.optimizer import learning_rate_factor
from fedlab.train.trainer import train_client


def session_of(toml: str, *overrides: str) -> Session:
    return open_session(RunConfig.parse(toml, overrides).to_toml())


def train(
    session: Session,
    client: str = "client-0",
    plan: DPPlan | None = None,
    round_number: int = 1,
    parts=("lora_B", "head"),
) -> Trained:
    state = initial_state(session.model, session.config.lora, 0)
    names = [n for n in state if n.endswith(parts) or ("head" in parts and n.startswith("head."))]
    return train_client(session.model, session.data, client, state, names, session.config, round_number, plan)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_client_of_lower_rank_trains_as_if_the_adapter_were_that_small(optimizer: str, tiny_toml: str):
    """Without DP, from a start with B ≠ 0: the same steps as a model whose adapter has this rank and the same scale."""
    settings = [
        f"train.optimizer={optimizer}",
        "train.momentum=0.0",
        "train.lr=0.05",
        "train.weight_decay=0.01",
        "train.prox=0.1",
    ]
    large, small = session_of(tiny_toml, *settings), None
    g = torch.Generator().manual_seed(0)
    state = {
        n: torch.randn(v.shape, generator=g).mul(0.3)
        for n, v in initial_state(large.model, large.config.lora, 0).items()
    }
    names = sorted(state)
    found = train_client(large.model, large.data, "client-0", state, names, large.config, 1, None, rank=2).update
    small = session_of(tiny_toml, *settings, "lora.rank=2", "lora.alpha=4")
    wanted = train_client(small.model, small.data, "client-0", narrow(state, 2), names, small.config, 1, None).update
    for name in names:
        assert found[name].shape == wanted[name].shape
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6), name
        assert found[name].any(), name


@pytest.mark.parametrize("parts", [("lora_B", "head"), ("lora_A", "lora_B", "head")])
def test_no_noise_falls_into_directions_that_a_client_does_not_have(parts: tuple[str, ...], tiny_toml: str):
    session = session_of(tiny_toml)
    state = initial_state(session.model, session.config.lora, 0)
    names = [n for n in state if n.endswith(parts) or n.startswith("head.")]
    plan = plan_of(session)
    update = train_client(session.model, session.data, "client-0", state, names, session.config, 1, plan, rank=3).update
    left = session.model.state()
    for name in names:
        if ".lora_" in name:
            assert update[name].shape == narrow(state, 3)[name].shape
            assert update[name].abs().min() > 0, "noise in every entry that is trained"
            tail = left[name][3:] if name.endswith("lora_A") else left[name][:, 3:]
            assert not tail.any()


def plan_of(session: Session, client: str = "client-0", **change) -> DPPlan:
    values = {
        "n": session.data.size(client),
        "batch_size": 16,
        "steps": 3,
        "sigma": 1.0,
        "clip": 0.3,
        "delta": 1e-5,
        "participations": 3,
    }
    return DPPlan(**{**values, "noise": "seeded", **change})


def difference(a: Trained, b: Trained) -> float:
    return max(float((a.update[n] - b.update[n]).abs().max()) for n in a.update)


def test_dp_sgd_against_a_loop_over_single_examples(tiny_toml: str):
    """The whole step: batch, clip, noise, division, momentum, learning rates; slow and straight."""
    session = session_of(tiny_toml, "train.head_lr=0.2")
    model, data, config = session.model, session.data, session.config
    plan = plan_of(session)
    found = train(session, plan=plan)
    state = initial_state(model, config.lora, 0)
    names = sorted(found.update)
    model.load(state)
    draws, noise = random_stream(3, "batches", "client-0", 1), random_stream(3, "noise", "client-0", 1)
    velocity = {n: torch.zeros_like(state[n], dtype=torch.float64) for n in names}
    for _ in range(3):
        batch = np.flatnonzero(draws.random(plan.n) < plan.q)
        total = {n: torch.zeros_like(state[n], dtype=torch.float64) for n in names}
        parameters = [model.parameters[n].requires_grad_() for n in names]
        for index in data.train("client-0")[batch]:
            one = data.tokens.batch(np.array([index]), model.tokenizer.pad_token_id)
            gradient = torch.autograd.grad(cross_entropy(model.logits(one), one["labels"]), parameters)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
            for n, g in zip(names, gradient, strict=True):
                total[n] += g.double() * min(1.0, plan.clip / norm)
        for n in names:
            noised = (total[n] + torch.from_numpy(noise.standard_normal(total[n].shape)) * plan.sigma * plan.clip) / (
                plan.q * plan.n
            )
            velocity[n] = 0.5 * velocity[n] + noised
            with torch.no_grad():
                model.parameters[n] -= ((0.2 if n.startswith("head.") else 0.5) * velocity[n]).float()
    model.module.requires_grad_(False)
    new = model.state()
    for n in names:
        assert torch.allclose(found.update[n], new[n] - state[n], atol=2e-6), n


@pytest.mark.parametrize("dp", [False, True])
def test_physical_batches_do_not_change_the_result(dp: bool, tiny_toml: str):
    results = []
    for size in (1, 5, 64):
        session = session_of(tiny_toml, f"train.physical_batch={size}")
        results.append(train(session, plan=plan_of(session) if dp else None))
    assert difference(results[0], results[1]) < 1e-6
    assert difference(results[0], results[2]) < 1e-6


def test_an_empty_batch_is_a_noised_step(tiny_toml: str):
    session = session_of(tiny_toml)
    never = plan_of(session)
    object.__setattr__(never, "batch_size", 1e-12)  # q so small that no example is ever drawn
    found = train(session, plan=never)
    assert math.isnan(found.loss)
    assert math.isnan(found.clip_fraction)
    assert found.steps == 3
    assert all(bool(value.any()) for value in found.update.values()), "noise was applied"


def test_each_client_and_round_has_its_own_draws_and_repeats_them(tiny_toml: str):
    session = session_of(tiny_toml)
    plan = plan_of(session)
    first = train(session, plan=plan)
    train(session, "client-1", plan_of(session, "client-1"))  # another client in between changes nothing
    assert difference(first, train(session, plan=plan)) == 0
    assert difference(first, train(session, plan=plan, round_number=2)) > 0


def test_dropout_is_drawn_from_the_clients_stream_and_ends_with_the_training(tiny_toml: str):
    session = session_of(tiny_toml, "lora.dropout=0.5")
    state = torch.random.get_rng_state()
    first = train(session)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(7)
    assert difference(first, train(session)) == 0
    assert not any(module.training for module in session.model.module.modules())


@pytest.mark.parametrize("dp", [False, True])
def test_only_what_is_named_changes(dp: bool, tiny_toml: str):
    session = session_of(tiny_toml)
    frozen = {
        n: p.detach().clone()
        for n, p in session.model.module.named_parameters()
        if "lora" not in n and "modules_to_save" not in n
    }
    found = train(session, plan=plan_of(session) if dp else None, parts=("lora_B",))
    assert all(n.endswith("lora_B") for n in found.update)
    assert all(torch.equal(p, frozen[n]) for n, p in session.model.module.named_parameters() if n in frozen)
    assert not any(p.requires_grad or p.grad is not None for p in session.model.module.parameters())


def test_prox_pulls_towards_the_received_state(tiny_toml: str):
    def size(prox: float) -> float:
        session = session_of(tiny_toml, f"train.prox={prox}", "train.steps=20", "train.momentum=0.0")
        return float(sum(v.square().sum() for v in train(session).update.values()))

    assert size(1.0) < 0.5 * size(0.0)


def test_adamw_and_weight_decay_run(tiny_toml: str):
    found = train(
        session_of(tiny_toml, "train.optimizer=adamw", "train.momentum=0.0", "train.lr=0.01", "train.weight_decay=0.1")
    )
    assert all(bool(v.any()) for v in found.update.values())


def test_divergence_is_an_error_that_names_the_client_and_the_rate(tiny_toml: str):
    session = session_of(tiny_toml, "train.lr=1e38")
    with pytest.raises(RunFailed, match=r"client-0: local training diverged .* train.lr = 1e\+38"):
        train(session)


def test_nothing_to_train_is_an_error(tiny_toml: str):
    session = session_of(tiny_toml)
    with pytest.raises(RunFailed, match="nothing is trainable"):
        train(session, parts=("nothing",))


def test_steps_from_epochs(tiny_toml: str):
    config = RunConfig.parse(tiny_toml.replace("steps = 3", "epochs = 1.5"))
    assert config.train.local_steps(100) == math.ceil(150 / 16)


def test_schedules():
    def factors(schedule: str, warmup: int = 0) -> list[float]:
        config = RunConfig.parse(
            "[run]\nrounds=4\n[lora]\nrank=1\nalpha=1\n[train]\nlr=1\nsteps=1\n",
            [f"train.schedule={schedule}", f"train.warmup_rounds={warmup}"],
        )
        return [learning_rate_factor(config.train, r, 4) for r in range(1, 5)]

    assert factors("constant") == [1, 1, 1, 1]
    assert factors("linear") == [1, 0.75, 0.5, 0.25]
    assert factors("cosine")[0] == 1
    assert min(factors("cosine")) > 0
    assert factors("constant", 2) == pytest.approx([1 / 3, 2 / 3, 1, 1])
