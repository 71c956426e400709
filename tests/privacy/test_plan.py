"""The plan: one object from which both the noise and the event come."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.config.sections import PrivacySection, TrainSection
from fedlab.errors import ConfigError, PrivacyError, Unreachable
from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.ledger.spending import PrivacySpent, summary
from fedlab.privacy.noise_share import NoiseShare
from fedlab.privacy.plan import DPPlan, default_delta, make_plan, plan_of
from fedlab.seeds import random_stream
from strategies import STRATEGIES

PLAN = DPPlan(n=200, batch_size=20, steps=5, sigma=1.5, clip=0.5, delta=1e-5, participations=4, noise="seeded")
TRAIN = TrainSection(lr=1.0, steps=5, batch_size=20)


def section(**values) -> PrivacySection:
    return PrivacySection(**{"unit": "example", "clip": 0.5, **values})


SHARED = """
[run]
rounds = 12
[lora]
rank = 4
alpha = 8
[data]
clients = 6
[train]
lr = 0.1
steps = 1
sampling_rate = 0.2
[privacy]
unit = "example"
epsilon = 6.0
clip = 1.0
survivors = 4
colluding = 1
"""


def test_under_shared_noise_all_clients_come_to_one_claim():
    """From the configuration alone: σ, δ, q and the share do not depend on how many records a client has."""
    config = RunConfig.parse(SHARED)
    plans = [plan_of(config, n) for n in (5, 64, 1000, 9000)]
    assert len({(p.sigma, p.delta, p.q, p.steps, p.event(), str(p.shared_terms(100))) for p in plans}) == 1
    assert [p.normaliser for p in plans] == [0.2 * n for n in (5, 64, 1000, 9000)]
    assert plans[0].delta == 1e-5
    assert 5.97 < plans[0].epsilon(12) <= 6.0
    assert plans[0].event().sampler == "poisson_discrete"
    assert plans[0].shared == NoiseShare(4, 1)


def test_under_shared_noise_delta_is_the_configurations_or_refused():
    budget = "privacy.budget={epsilon=9, delta=1e-6}"
    for extra, delta in (([], 1e-5), (["privacy.delta=1e-7"], 1e-7), ([budget], 1e-6)):
        assert plan_of(RunConfig.parse(SHARED, extra), 5000).delta == delta
    with pytest.warns(UserWarning, match="above 0.1"):
        assert plan_of(RunConfig.parse(SHARED), 50_000).delta == 1e-5
    with pytest.raises(Unreachable, match="δ·n >= 1"):
        plan_of(RunConfig.parse(SHARED), 100_000)


def test_a_rate_without_shared_noise_is_each_clients_own_draw():
    config = RunConfig.parse(SHARED, ["privacy={unit='example', sigma=1.0, clip=1.0}", "train.steps=3"])
    plan = plan_of(config, 50)
    assert (plan.q, plan.normaliser, plan.steps, plan.event().sampler) == (0.2, 10.0, 3, "poisson")


@pytest.mark.parametrize(
    "change", [{"rate": 0.0}, {"rate": 1.1}, {"shared": NoiseShare(2), "rate": None}, {"shared": NoiseShare(2)}]
)
def test_a_plan_that_shares_noise_has_a_rate_and_one_step(change: dict[str, Any]):
    with pytest.raises(ValueError, match="rate"):
        DPPlan(**{**vars(PLAN), "rate": 0.1, **change})


def test_event_noise_and_normaliser_belong_together():
    assert PLAN.event() == Event("poisson", 0.1, 1.5, 5)
    assert PLAN.event(rounds=4).steps == 20
    assert PLAN.normaliser == 20.0
    zeros = {"b": torch.zeros(300, 200), "a": torch.zeros(100)}
    noised = PLAN.privatise(zeros, PLAN.noise_source(random_stream(0, "noise")))
    for value in noised.values():
        assert float(value.std()) == pytest.approx(1.5 * 0.5 / 20, rel=0.25 if value.ndim == 1 else 0.02)
    assert noised["a"].dtype == torch.float64


def test_an_empty_batch_is_noise_and_nothing_else():
    total = {"b": torch.zeros(4, 2, dtype=torch.float64)}
    found = PLAN.privatise(total, PLAN.noise_source(random_stream(3, "noise")))
    drawn = PLAN.noise_source(random_stream(3, "noise")).draw((4, 2), 1.5 * 0.5) / 20
    assert torch.equal(found["b"], drawn)


def test_the_signal_is_divided_by_the_expected_batch_size():
    quiet = DPPlan(n=200, batch_size=20, steps=1, sigma=1e-12, clip=1.0, delta=1e-5, participations=1, noise="seeded")
    found = quiet.privatise({"b": torch.full((3,), 60.0)}, quiet.noise_source(random_stream(0, "noise")))
    assert torch.allclose(found["b"], torch.full((3,), 3.0, dtype=torch.float64))


def test_a_batch_larger_than_the_client_is_everybody():
    plan = DPPlan(n=8, batch_size=20, steps=1, sigma=1.0, clip=1.0, delta=1e-3, participations=1, noise="seeded")
    assert (plan.q, plan.normaliser) == (1.0, 8.0)
    assert len(plan.batch(random_stream(0, "b"))) == 8


def test_secure_plans_draw_batches_that_no_seed_foretells():
    """The server knows the run's seed; sampling amplifies nothing towards somebody who can redraw the batches."""
    secure = dataclasses.replace(PLAN, n=2000, batch_size=200, noise="secure")
    first, second = (secure.batch(random_stream(0, "batches")) for _ in range(2))
    assert first.tolist() != second.tolist()
    assert abs(len(first) - 200) < 6 * math.sqrt(180)
    seeded = dataclasses.replace(secure, noise="seeded")
    assert seeded.batch(random_stream(0, "batches")).tolist() == seeded.batch(random_stream(0, "batches")).tolist()
    assert len(dataclasses.replace(secure, batch_size=2000).batch(random_stream(0, "batches"))) == 2000


@pytest.mark.parametrize(("sigma", "clip"), [(1e-200, 1e-200), (math.inf, 1.0), (1.0, math.inf)])
def test_noise_that_vanishes_or_overflows_is_refused(sigma: float, clip: float):
    with pytest.raises(ValueError, match="positive and finite"):
        dataclasses.replace(PLAN, sigma=sigma, clip=clip)


@pytest.mark.parametrize("field", ["n", "batch_size", "steps", "sigma", "clip", "delta", "participations"])
def test_nonsense_is_refused_by_name(field: str):
    with pytest.raises(ValueError, match=field):
        DPPlan(**{**vars(PLAN), field: 0})


def test_calibrated_plans_spend_at_most_epsilon_over_all_participations():
    plan = make_plan(section(epsilon=3.0), TRAIN, 200, 4)
    assert 2.97 < plan.epsilon(4) <= 3.0
    assert plan.epsilon(1) < plan.epsilon(4)
    assert make_plan(section(epsilon=3.0), TRAIN, 200, 8).sigma > plan.sigma


def test_delta_policy():
    assert default_delta(100) == 1e-5
    assert default_delta(10**6) == pytest.approx(1e-7)
    assert make_plan(section(sigma=1.0), TRAIN, 50_000, 1).delta == pytest.approx(2e-6)
    with pytest.warns(UserWarning, match=r"above 0\.1"):
        make_plan(section(sigma=1.0, delta=1e-3), TRAIN, 200, 1)
    with pytest.raises(PrivacyError, match="publishing a record outright"):
        make_plan(section(sigma=1.0, delta=1e-2), TRAIN, 200, 1)


def test_epochs_become_steps():
    assert make_plan(section(sigma=1.0), TrainSection(lr=1.0, epochs=1.5, batch_size=32), 100, 1).steps == math.ceil(
        1.5 * 100 / 32
    )


def test_a_client_level_run_has_no_plan_of_a_client():
    with pytest.raises(ConfigError, match="no plan of a client"):
        make_plan(PrivacySection(unit="client", sigma=1.0, clip=1.0), TRAIN, 100, 1)


def test_the_budgets_delta_is_the_plans_unless_one_is_given():
    budget = {"epsilon": 1.0, "delta": 1e-6}
    assert make_plan(section(sigma=1.0, budget=budget), TRAIN, 100, 1).delta == 1e-6
    assert make_plan(section(sigma=1.0, budget=budget, delta=1e-7), TRAIN, 100, 1).delta == 1e-7
    assert make_plan(section(sigma=1.0, budget={"epsilon": 1.0}), TRAIN, 100, 1).delta == 1e-5


def test_spent_composes_actual_rounds_and_the_run_is_the_maximum():
    spent = PrivacySpent({"client-0": 1e-5, "client-1": 1e-5})
    spent.record("client-0", [PLAN.event()] * 3)
    spent.record("client-1", [PLAN.event()])
    found = spent.epsilons()
    assert found["client-0"] == epsilon([PLAN.event(rounds=3)], 1e-5)
    assert found["client-1"] == epsilon([PLAN.event()], 1e-5)
    assert summary(found)["max"] == found["client-0"]
    assert spent.worst() == pytest.approx(found["client-0"], abs=1e-3)
    assert PrivacySpent({"client-9": 1e-5}).epsilons() == {"client-9": 0.0}
    with pytest.raises(KeyError):
        spent.record("stranger", [PLAN.event()])


def test_what_is_assumed_of_a_silent_client_counts_until_its_ledger_is_seen():
    spent = PrivacySpent({"client-0": 1e-5})
    spent.assume("client-0", PLAN.event())
    assert spent.unseen() == ["client-0"]
    assert spent.epsilons()["client-0"] == epsilon([PLAN.event()], 1e-5)
    spent.record("client-0", [])
    assert spent.unseen() == []
    assert spent.epsilons()["client-0"] == 0
    spent.assume("client-0", PLAN.event(), for_good=True)
    spent.record("client-0", [])
    assert spent.epsilons()["client-0"] == epsilon([PLAN.event()], 1e-5), "an update without a charge is not forgotten"


def stream(*tasks: tuple[str, int], strategy: str = "fedsvd", **privacy: object) -> RunConfig:
    """A stream of tasks (name, rounds); half of six clients take part in a round."""
    given = {"unit": "example", "clip": 1.0, **(privacy or {"epsilon": 6.0})}
    text = "[run]\nrounds = 4\nfraction = 0.5\n[lora]\nrank = 2\nalpha = 4\n"
    text += "[train]\nlr = 0.1\nepochs = 1\nbatch_size = 20\n"
    text += f"[strategy]\nname = '{strategy}'\n[data]\nclients = 6\n[privacy]\n"
    text += "".join(f"{key} = {value!r}\n" for key, value in given.items())
    text += "".join(f"[[tasks]]\nname = '{name}'\nrounds = {rounds}\n" for name, rounds in tasks)
    return RunConfig.parse(text)


def spent(config: RunConfig, n: int) -> float:
    """ε of a client that takes part in its share of every task's rounds, rounded up, and in all releases."""
    plan = plan_of(config, n, [n] * len(config.tasks))
    rounds = sum(math.ceil(count / 2) for count in config.task_rounds)
    events = [Event("poisson", 20 / n, plan.sigma, math.ceil(n / 20) * rounds)]
    if config.gram is not None:
        events += [Event("full", 1.0, config.gram.sigma, len(config.tasks) - 1)]
    return epsilon(events, plan.delta, interval=1e-3)


@pytest.mark.parametrize("strategy", ["fedsvd", "fedsvd-continual"])
def test_a_streams_plan_spends_its_epsilon_over_all_tasks_and_releases(strategy: str):
    config = stream(("a", 4), ("b", 5), ("c", 2), strategy=strategy)
    config = STRATEGIES[strategy].resolved(config)
    assert (config.gram is not None) == (strategy == "fedsvd-continual")
    assert 5.95 < spent(config, 200) <= 6.0


def test_a_streams_delta_is_the_smallest_of_its_tasks():
    config = stream(("a", 4), ("b", 4), sigma=1.0)
    sizes = [200, 50_000]
    assert plan_of(config, 200, sizes).delta == default_delta(50_000) < default_delta(200)
    assert plan_of(config, 50_000, sizes[::-1]).delta == default_delta(50_000)
