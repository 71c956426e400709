"""Warnings beside a result: when they are there, when they are not, and what they name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedlab.config import RunConfig
from fedlab.run.cautions import cautions, noise_ratio

HELD_OUT = {"fruit": 20, "metal": 30, "ocean": 50}


@pytest.fixture
def config(tiny_toml: str) -> RunConfig:
    return RunConfig.parse(tiny_toml)


def scored(*losses: float | str | None) -> list[dict[str, Any]]:
    return [{"phase": "evaluate", "round": i, "scores": {"loss": loss}} for i, loss in enumerate(losses)]


def trained(*rounds: dict[str, str]) -> list[dict[str, Any]]:
    return [{"phase": "train", "round": i, "loss": None, "excluded": out} for i, out in enumerate(rounds, 1)]


def result(accuracy: float = 0.9, **more: Any) -> dict[str, Any]:
    return {"scores": {"accuracy": accuracy}, "primary": "accuracy", "clients": {}, **more}


def test_a_run_like_any_other_has_none(config: RunConfig):
    lines = [*scored(1.2, 0.9, 0.95), *trained({}, {})]
    assert cautions(config, result(noise_ratio=0.5), lines, HELD_OUT) == []


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((1.1, 68846.0), "loss is 6.885e+04, where guessing evenly among 3 labels costs 1.1"),
        ((1.1, None), "not a number"),
        ((1.1, "inf"), "not a number"),
        ((1.1, 0.6, 1.3), "loss grew from 0.6 (round 1) to 1.3"),
    ],
)
def test_a_loss_that_diverges_is_told(losses: tuple[Any, ...], words: str, config: RunConfig):
    (found,) = cautions(config, result(), scored(*losses), HELD_OUT)
    assert words in found
    assert "train.lr" in found


@pytest.mark.parametrize("losses", [(1.1, 1.2), (0.1, 0.4), (5.0, 1.0)])
def test_a_loss_within_what_happens_is_not(losses: tuple[float, ...], config: RunConfig):
    assert cautions(config, result(), scored(*losses), HELD_OUT) == []


def test_nothing_is_said_of_a_loss_that_nobody_measured(config: RunConfig):
    other, empty = {"phase": "evaluate", "round": 1, "scores": {"f1": 0.5}}, scored(None)[0] | {"examples": 0}
    assert cautions(config, result(), [other, empty], HELD_OUT) == []


def test_training_loss_counts_where_clients_share_it(config: RunConfig):
    lines = [line | {"loss": loss} for line, loss in zip(trained({}, {}), (0.5, 900.0), strict=True)]
    assert "training loss is 900" in cautions(config, result(), lines, HELD_OUT)[0]


@pytest.mark.parametrize(
    ("accuracy", "there", "missing"),
    [
        (0.5, "answering 'ocean' every time (0.5000)", "guessing"),
        (0.2, "answering 'ocean' every time (0.5000) or guessing evenly among 3 labels (0.3333)", "\n"),
    ],
)
def test_a_score_at_or_below_chance_says_which(accuracy: float, there: str, missing: str, config: RunConfig):
    (found,) = cautions(config, result(accuracy), [], HELD_OUT)
    assert there in found
    assert missing not in found
    assert cautions(config, result(0.51), [], HELD_OUT) == []


def test_clients_score_where_there_is_no_global_model(config: RunConfig):
    own = {"scores": None, "primary": "accuracy", "client_scores": {"mean": 0.4}, "clients": {}}
    assert "accuracy 0.4000" in cautions(config, own, [], HELD_OUT)[0]
    assert cautions(config, {**own, "client_scores": {"mean": None}}, [], HELD_OUT) == []


def test_who_was_left_out_is_named_with_the_last_reason(config: RunConfig):
    rounds = trained({"a": "diverged: x"}, {"a": "memory: y", "b": "lost"}, {})
    assert cautions(config, result(), rounds, HELD_OUT) == [
        "a was excluded in 2 of 3 rounds: memory: y",
        "b was excluded in 1 of 3 rounds: lost",
    ]
    refused = result(clients={"c": {"refused": "budget", "examples": 9, "delta": None}})
    assert cautions(config, refused, [], HELD_OUT) == ["c takes no further part: budget"]
    many = cautions(config, result(), trained({f"client-{i}": "lost" for i in range(30)}), HELD_OUT)
    assert len(many) == 4
    assert "27 more clients" in many[-1]


def test_noise_that_drowns_and_a_large_delta_are_told(config: RunConfig):
    assert "40" in cautions(config, result(noise_ratio=40.0), [], HELD_OUT)[0]
    large = result(clients={"a": {"examples": 500, "delta": 1e-3}, "b": {"examples": 5, "delta": 1e-3}})
    assert "large for a: δ·n = 0.5" in cautions(config, large, [], HELD_OUT)[0]


def test_the_ratio_is_that_of_sums_of_noise_and_of_gradients():
    """Two clients, other noise and steps: the norm of what is really added, against steps · clip."""
    import torch

    parts, d = [(0.5, 4), (0.25, 6)], 20_000
    noise = sum(std * torch.randn(d, generator=torch.manual_seed(i), dtype=torch.float64)
                for i, std in enumerate(std for std, count in parts for _ in range(count)))  # fmt: skip
    found = noise_ratio(parts, d)
    assert found is not None
    assert math.isclose(found, float(torch.as_tensor(noise).norm()) / 10, rel_tol=0.02)
    assert noise_ratio([], d) is None
