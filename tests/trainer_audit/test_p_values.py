"""p-values of the conformance checks: uniform where the claim holds, tiny where it does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedlab.trainer_audit import p_values

RNG = np.random.default_rng


def variance(rng: np.random.Generator) -> float:
    return p_values.variance_p(float(np.square(2 * rng.standard_normal(10)).sum()), 10, 2.0)


def correlation(rng: np.random.Generator) -> float:
    return float(p_values.correlation_p(np.corrcoef(rng.standard_normal((2, 8)))[0, 1:], 8)[0])


def rate(rng: np.random.Generator) -> float:
    return p_values.rate_p(int(rng.binomial(3000, 0.1)), 3000, 0.1)


def records(rng: np.random.Generator) -> float:
    return p_values.dispersion((rng.random((300, 45)) < 0.1).sum(1), 45, 0.1)[1]


def sizes(rng: np.random.Generator) -> float:
    return p_values.dispersion(rng.binomial(300, 0.1, 45), 300, 0.1)[1]


def overlap(rng: np.random.Generator) -> float:
    a, b = rng.random((2, 300)) < 0.1
    return p_values.overlap_p(int((a & b).sum()), 300, 0.1)


@pytest.mark.parametrize("law", [variance, correlation, rate, records, sizes, overlap], ids=lambda f: f.__name__)
def test_p_values_are_at_most_as_often_small_as_they_say(law: Callable[[np.random.Generator], float]):
    p = np.array([law(RNG(seed)) for seed in range(600)])
    for level in (0.1, 0.01):
        assert (p < level).mean() <= 1.3 * level + 3 * np.sqrt(level / len(p))


def test_the_dispersion_law_does_not_accuse_at_the_level_that_is_used():
    """Its tail is a gamma's only nearly, so the far end is tried itself: the smallest of many p-values of correct
    samplers.
    """
    counts = RNG(0).binomial(45, 0.1, (20_000, 300))
    spread = np.square(counts - 4.5).sum(1)
    for extreme in (int(spread.argmin()), int(spread.argmax())):
        assert p_values.dispersion(counts[extreme], 45, 0.1)[1] > 1e-6


def test_what_is_wrong_is_accused():
    assert p_values.variance_p(1000 * 0.8**2, 1000, 1.0) < 1e-7
    assert p_values.variance_p(float("nan"), 10, 1.0) == 0
    assert p_values.shape_p((RNG(0).random(5000) - 0.5) * 12**0.5) < 1e-7
    assert p_values.correlation_p(np.array([0.5]), 500)[0] < 1e-7
    assert p_values.correlation_p(np.array([np.nan]), 500)[0] == 1
    assert p_values.rate_p(500, 3000, 0.1) < 1e-7
    assert p_values.dispersion(np.full(45, 30), 300, 0.1) == (0.0, 0.0)
    assert p_values.overlap_p(30, 300, 0.1) < 1e-7
