"""The server's side of an aggregation: weights that were declared, and noise of its own for every round."""

from __future__ import annotations

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.privacy.client_level import make_client_plan
from strategies import STRATEGIES
from strategies.server.aggregation import aggregate, noise_source
from strategies.server.federation import ClientInfo, Federation
from strategies.server.outcome import TrainOutcome

TEXT = (
    "[run]\nrounds = 4\n[lora]\nrank = 2\nalpha = 4\n[train]\nlr = 0.1\nsteps = 1\n[data]\nclients = 3\n"
    "[strategy]\nname = 'fedavg'\n"
)
SIZES = {"client-0": 10, "client-1": 30, "client-2": 60}
STATE = {"m.lora_A": torch.zeros(2, 3), "m.lora_B": torch.zeros(4, 2), "head.w": torch.zeros(2)}
CLIENT_LEVEL = "privacy={unit='client', sigma=2.0, clip=0.5, noise='%s'}"


def config(*overrides: str) -> RunConfig:
    return RunConfig.parse(TEXT, overrides)


def outcome_of(**values: float) -> TrainOutcome:
    """Updates that are one number each, of clients that say they are huge."""
    updates = {f"client-{i[1:]}": {n: torch.full_like(v, x) for n, v in STATE.items()} for i, x in values.items()}
    return TrainOutcome(updates=updates, metrics={client: {"examples": 1e9, "steps": 1e9} for client in updates})


def federation(one: RunConfig) -> Federation:
    return Federation(one, {client: ClientInfo(size) for client, size in SIZES.items()}, {}, [1])


@pytest.mark.parametrize(("weights", "mean"), [("examples", (1.0 * 10 + 5.0 * 60) / 70), ("uniform", 3.0)])
def test_clients_weigh_what_they_declared_among_those_that_sent_something(weights: str, mean: float):
    one = config(f"strategy.weights={weights}", "privacy={unit='none'}")
    strategy = STRATEGIES["fedavg"](one)
    after, _ = aggregate(strategy, federation(one), None, STATE, {}, outcome_of(c0=1.0, c2=5.0), 1)
    for value in after.values():
        torch.testing.assert_close(value, torch.full_like(value, mean))


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_no_two_rounds_share_their_noise_and_secure_noise_comes_from_no_seed(noise: str):
    one = config(CLIENT_LEVEL % noise, "strategy.weights=uniform")
    plan = make_client_plan(one)
    draws = [noise_source(one, plan, number).draw((50,), 1.0) for number in (1, 2, 1)]
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2]) == (noise == "seeded")


def test_under_client_level_dp_what_is_kept_of_the_updates_is_one_noised_mean():
    one = config(CLIENT_LEVEL % "seeded", "strategy.weights=uniform")
    plan, strategy = make_client_plan(one), STRATEGIES["fedavg"](config("strategy.weights=uniform"))
    outcome = outcome_of(c0=100.0, c1=100.0)
    after, _ = aggregate(strategy, federation(one), plan, STATE, {}, outcome, 3)
    wanted = plan.mean(outcome.updates, STATE, noise_source(one, plan, 3))
    assert all(torch.equal(after[name], wanted[name]) for name in STATE)
