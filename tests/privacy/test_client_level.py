"""The server's mechanism: what one client can move, what the noise amounts to, and who is charged."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.state import State
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.client_level import ClientPlan, make_client_plan
from fedlab.privacy.noise import SeededNoise

LIKE: State = {"a.lora_B": torch.zeros(6, 3), "head.weight": torch.zeros(4, 5)}
PLAN = ClientPlan(n=10, sampler="poisson", q=0.3, sigma=1.5, clip=0.7, delta=1e-5, rounds=20, noise="seeded")


def noise(seed: int = 0) -> SeededNoise:
    return SeededNoise(np.random.default_rng(seed))


def update(seed: int, scale: float) -> State:
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(scale * rng.standard_normal(value.shape)).float() for name, value in LIKE.items()}


def distance(left: State, right: State) -> float:
    return math.sqrt(sum(float((left[n].double() - right[n].double()).square().sum()) for n in LIKE))


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-6, 1e12), others=st.integers(0, 4), seed=st.integers(0, 2**20))
def test_one_client_moves_the_sum_by_at_most_the_clip(scale: float, others: int, seed: int):
    rest = {f"client-{i}": update(seed + i, 1.0) for i in range(others)}
    with_it = PLAN.mean(rest | {"client-9": update(seed + 9, scale)}, LIKE, noise())
    moved = distance(with_it, PLAN.mean(rest, LIKE, noise())) * PLAN.normaliser
    assert moved <= PLAN.clip * (1 + 1e-4)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_update_contributes_nothing(poison: float):
    bad = update(1, 0.1)
    bad["head.weight"][0, 0] = poison
    assert distance(PLAN.mean({"client-0": bad}, LIKE, noise()), PLAN.mean({}, LIKE, noise())) == 0


def test_the_mean_is_the_clipped_sum_over_the_expected_number_and_small_updates_pass_whole():
    updates = {f"client-{i}": update(i, 1e-3) for i in range(3)}
    quiet = ClientPlan(n=10, sampler="poisson", q=0.3, sigma=1e-9, clip=0.7, delta=1e-5, rounds=1, noise="seeded")
    mean = quiet.mean(updates, LIKE, noise())
    for name in LIKE:
        expected = sum(u[name].double() for u in updates.values()) / 3.0  # q·n = 3, whoever is there
        torch.testing.assert_close(mean[name].double(), expected, rtol=1e-5, atol=1e-9)


def test_no_bit_depends_on_the_order_in_which_updates_arrive():
    quiet = ClientPlan(n=3, sampler="full", q=1.0, sigma=1e-20, clip=100.0, delta=1e-5, rounds=1, noise="seeded")
    sizes = {"client-0": 1.0, "client-1": 1e-9, "client-2": -1.0}  # what is left of the small one depends on the order
    updates = {client: {name: torch.full_like(v, size) for name, v in LIKE.items()} for client, size in sizes.items()}
    means = [quiet.mean({c: updates[c] for c in order}, LIKE, noise()) for order in permutations(updates)]
    assert all(torch.equal(mean[name], means[0][name]) for mean in means for name in LIKE)


def test_an_empty_round_is_noise_of_the_right_size():
    draws = torch.cat([PLAN.mean({}, LIKE, noise(seed))["head.weight"].flatten() for seed in range(400)]).double()
    std = PLAN.sigma * PLAN.clip / PLAN.normaliser
    assert float(draws.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * len(draws)))
    assert abs(float(draws.mean())) < 4 * std / math.sqrt(len(draws))


def config(*overrides: str, tasks: str = "") -> RunConfig:
    text = """
    [run]
    rounds = 8
    [lora]
    rank = 4
    alpha = 4
    [strategy]
    weights = "uniform"
    [train]
    steps = 1
    lr = 0.1
    [data]
    clients = 100
    [privacy]
    unit = "client"
    epsilon = 4.0
    clip = 1.0
    """
    return RunConfig.parse(text + tasks, overrides)


@pytest.mark.parametrize(
    ("overrides", "sampler", "q"),
    [
        ([], "full", 1.0),
        (["run.fraction=0.2", "run.sampling=poisson"], "poisson", 0.2),
        (["run.fraction=0.2"], "fixed_wor", 0.2),
        (["run.fraction=0.2", "run.sampling=uniform"], "fixed_wor", 0.2),
    ],
)
def test_calibration_spends_at_most_epsilon_for_every_way_of_drawing(overrides: list[str], sampler: str, q: float):
    plan = make_client_plan(config(*overrides))
    assert plan.event(8) == Event(sampler, q, plan.sigma, 8)
    assert 3.9 < epsilon([plan.event(8)], plan.delta) <= 4.0
    assert plan.terms()["unit"] == "client"


@pytest.mark.parametrize("joint", [False, True])
def test_in_a_stream_sigma_is_for_the_rounds_of_all_tasks(joint: bool):
    tasks = "[[tasks]]\nname = 'a'\nrounds = 8\n[[tasks]]\nname = 'b'\nrounds = 24\n"
    plan = make_client_plan(config(f"stream.joint={str(joint).lower()}", tasks=tasks))
    assert 3.9 < epsilon([plan.event(32)], plan.delta) <= 4.0


def test_a_given_sigma_is_kept_and_unequal_weights_are_refused():
    assert make_client_plan(config("privacy={unit='client', sigma=2.5, clip=1.0}")).sigma == 2.5
    with pytest.raises(ConfigError, match="a large client would move the mean"):
        make_client_plan(config("strategy.weights=examples"))
    with pytest.raises(ConfigError, match="participations has no meaning"):
        config("privacy.participations=3")
