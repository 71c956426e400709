"""What a policy makes of a plan: numbers that only the number of records decides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from clients.policy import OwnPolicy
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile, ClientPolicy
from fedlab.errors import ConfigError
from fedlab.privacy.accounting import Event
from fedlab.privacy.plan import DPPlan

PLAN = DPPlan(n=200, batch_size=20, steps=5, sigma=1.5, clip=0.5, delta=1e-6, participations=4, noise="secure")
RELEASE = Event("full", 1.0, 2.0, 1)


def policy(**rules: Any) -> OwnPolicy:
    return OwnPolicy(ClientPolicy(**{"min_sigma": 0.5, **rules}), ("m",), True)


def said(plan: DPPlan, *beside: Event, **rules: Any) -> str:
    return policy(**rules).problem_of_plan(plan, beside) or ""


def test_what_is_at_the_limit_is_allowed():
    alone = PLAN.epsilon(4)
    assert said(PLAN, min_sigma=1.5, max_epsilon=alone, max_delta=1e-6, min_batch=20) == ""


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ({"min_sigma": 1.51}, "σ = 1.5"),
        ({"max_epsilon": 0.99 * PLAN.epsilon(4)}, "ε = "),
        ({"max_delta": 0.9e-6}, "δ = 1e-06"),
        ({"min_batch": 21}, "20 expected examples per step"),
    ],
)
def test_what_is_beyond_a_limit_is_named(rules: dict[str, Any], named: str):
    assert said(PLAN, **rules).startswith(named)


def test_a_releases_epsilon_counts_with_that_of_the_rounds():
    limit = 1.05 * PLAN.epsilon(4)
    assert said(PLAN, max_epsilon=limit) == ""
    assert said(PLAN, RELEASE, max_epsilon=limit).startswith("ε = ")


def test_the_least_noise_is_asked_of_every_release():
    assert said(PLAN, RELEASE, min_sigma=1.2) == ""
    assert said(PLAN, dataclasses.replace(RELEASE, sigma=1.0), min_sigma=1.2).startswith("σ = 1,")


SHARED = """
[run]
rounds = 2
[lora]
rank = 4
alpha = 8
[data]
clients = 6
[train]
lr = 0.1
steps = 1
sampling_rate = 0.1
[privacy]
unit = "example"
epsilon = 2.0
clip = 0.5
noise = "secure"
survivors = 4
colluding = 1
"""


@pytest.mark.parametrize(
    ("rules", "rostered", "named"),
    [
        ({}, True, "the policy does not allow noise that is shared"),
        ({"shared_noise": True}, False, "[roster] names no peers"),
        ({"shared_noise": True, "min_honest": 4}, True, "survivors − colluding = 3"),
        ({"shared_noise": True, "min_honest": 3}, True, "objective.labels is empty"),
    ],
)
def test_shared_noise_is_an_owners_choice(rules: dict[str, Any], rostered: bool, named: str):
    """The last one is refused for what comes after: of its noise nothing is."""
    one = OwnPolicy(ClientPolicy(**{"max_epsilon": 3.0, **rules}), ("m",), True, rostered=rostered)
    assert named in (one.problem(RunConfig.parse(SHARED), ["lora_B"]) or "")


@pytest.mark.parametrize(
    ("roster", "named"),
    [("x = 'ab'", "no public key"), (f"x = '{'a' * 64}'\ny = '{'a' * 64}'", "one key"), ("'../x' = 'ab'", "roster")],
)
def test_a_roster_has_a_key_for_each(roster: str, named: str, tmp_path: Path):
    text = (
        "[client]\nid = 'c'\n[data]\npath = 'd.csv'\ntext = 't'\nlabel = 'l'\n[models.m]\n[policy]\nmax_epsilon = 1.0\n"
    )
    with pytest.raises(ConfigError, match=named):
        ClientFile.parse(f"{text}[budget]\nepsilon = 2.0\n[roster]\n{roster}\n", tmp_path)


def test_a_client_with_fewer_records_than_a_batch_has_fewer_expected_examples():
    few = dataclasses.replace(PLAN, n=12)
    assert said(few, min_batch=13).startswith("12 expected examples per step")
    assert said(few, min_batch=12) == ""
