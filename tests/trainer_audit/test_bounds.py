"""Lower bounds on ε: against brute force, against simulated mechanisms whose ε is known, and against published
behaviour.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from fedlab.privacy.accounting import Event, epsilon
from fedlab.trainer_audit.bounds import (
    FRACTIONS,
    clopper_pearson_upper,
    fdp_mu,
    gdp_delta,
    gdp_epsilon,
    lower_bounds,
    one_run_guesses,
    steinke_epsilon,
    steinke_p_value,
)


def gaussian_audit(sigma: float, m: int, seed: int, delta: float = 1e-5) -> list[float]:
    """Bounds from the Gaussian mechanism on m orthogonal canaries: score = coin + N(0, σ²)."""
    rng = np.random.default_rng(seed)
    coins = rng.random(m) < 0.5
    return [bound.epsilon for bound in lower_bounds(coins + sigma * rng.standard_normal(m), coins, delta, seed=seed)]


@pytest.mark.parametrize(
    ("sigma", "m", "published"),
    [(1.0, 1000, (1.42, 2.00, 1.59)), (1.0, 3000, (1.86, 2.46, 3.10)), (0.5, 3000, (3.60, 5.27, 7.96))],
)
def test_mean_of_eight_runs_is_as_strong_as_published(sigma: float, m: int, published: tuple[float, ...]):
    found = np.mean([gaussian_audit(sigma, m, seed) for seed in range(8)], axis=0)
    true = epsilon([Event("full", 1.0, sigma, 1)], 1e-5)
    print(f"σ = {sigma}, m = {m}: steinke, f-dp, cp-gdp = {found.round(2)}, published {published}, true {true:.2f}")
    assert (found > np.array(published) - 0.15).all()
    assert (found < true).all()


@pytest.mark.parametrize(("sigma", "m"), [(1.0, 300), (2.0, 200), (0.5, 400)])
def test_no_bound_exceeds_the_truth_in_more_than_a_twentieth_of_all_runs(sigma: float, m: int):
    true = epsilon([Event("full", 1.0, sigma, 1)], 1e-5)
    above = np.mean([np.array(gaussian_audit(sigma, m, 1000 + seed)) > true for seed in range(60)], axis=0)
    assert (above <= 0.05).all(), above


def test_one_run_bounds_hold_where_guessing_is_as_good_as_it_can_be():
    """Randomised response attains ε exactly, and the Steinke bound assumes nothing: at most one run in twenty may
    exceed it.
    """
    rng, true, above = np.random.default_rng(5), 1.0, 0
    for _ in range(120):
        coins = rng.random(200) < 0.5
        told = coins ^ (rng.random(200) > 1 / (1 + math.exp(-true)))
        above += lower_bounds(told + 0.01 * rng.random(200), coins, 1e-9)[0].epsilon > true
    assert above <= 6


def brute_p_value(m: int, r: int, v: int, eps: float, delta: float) -> float:
    p = math.exp(eps) / (1 + math.exp(eps))
    pmf = [math.comb(r, k) * p**k * (1 - p) ** (r - k) for k in range(r + 1)]
    slack = max((sum(pmf[max(0, v - i) : v]) / i for i in range(1, m + 1)), default=0.0)
    return min(1.0, sum(pmf[v:]) + 2 * m * delta * slack)


@pytest.mark.parametrize(("m", "r"), [(8, 8), (12, 6), (30, 10)])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.01])
def test_the_p_value_is_the_formula(m: int, r: int, delta: float):
    for v in range(1, r + 1):
        for eps in (0.0, 0.5, 3.0):
            assert steinke_p_value(m, r, v, eps, delta) == pytest.approx(brute_p_value(m, r, v, eps, delta), abs=1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.02])
def test_the_p_value_bounds_a_simulated_mechanism(delta: float):
    """Randomised response at ε that reveals a coin outright with probability δ is (ε, δ)-DP for every coin."""
    rng, m, eps = np.random.default_rng(0), 10, 1.0
    right = rng.binomial(m, delta + (1 - delta) / (1 + math.exp(-eps)), size=400_000)
    for v in range(5, m + 1):
        seen, allowed = float((right >= v).mean()), steinke_p_value(m, m, v, eps, delta)
        assert seen <= allowed + 0.004
        if delta == 0:
            assert seen == pytest.approx(allowed, abs=0.004), "without δ it is the exact probability"


def test_the_p_value_bounds_a_mechanism_that_fails_altogether():
    """With probability δ all coins are told: (0, δ)-DP.

    All are right with probability about δ, and the bound must allow for it.
    """
    m, delta = 12, 0.05
    for v in range(m // 2, m + 1):
        true = delta + (1 - delta) * float(binom.sf(v - 1, m, 0.5))
        assert true <= steinke_p_value(m, m, v, 0.0, delta) + 1e-12


@pytest.mark.parametrize("r", [20, 200])
def test_all_right_is_capped(r: int):
    cap = math.log(0.05 ** (1 / r) / (1 - 0.05 ** (1 / r)))
    assert steinke_epsilon(2 * r, r, r, 0.0, 0.95) == pytest.approx(cap, abs=1e-5)


def slow_fdp_rejects(m: int, c: int, v: int, mu: float, alpha: float) -> bool:
    """The recursion with the trade-off curve f itself, and (1 − f)⁻¹ by bisection instead of in closed form."""

    def f(x: float) -> float:
        return float(norm.cdf(norm.ppf(1 - x) - mu))

    def inverse(y: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(45):
            middle = (low + high) / 2
            low, high = (middle, high) if 1 - f(middle) < y else (low, middle)
        return low

    r, h = alpha * v / m, alpha * (c - v) / m
    for i in reversed(range(v)):
        new = max(h, inverse(r))
        r, h = min(1.0, r + i / (c - i) * (new - h)), new
    return r + h > c / m


@pytest.mark.parametrize(("m", "c", "v"), [(100, 20, 19), (60, 30, 25), (200, 40, 40)])
def test_f_dp_against_a_slow_recursion(m: int, c: int, v: int):
    mu = fdp_mu(m, c, v, 0.95)
    assert mu > 0
    assert slow_fdp_rejects(m, c, v, mu - 0.002, 0.05)
    assert not slow_fdp_rejects(m, c, v, mu + 0.002, 0.05)


def test_f_dp_shows_nothing_by_chance():
    assert fdp_mu(100, 40, 20, 0.95) == 0
    assert fdp_mu(100, 40, 0, 0.95) == 0


def test_gdp_epsilon_against_dp_accounting():
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    for mu in (0.1, 1.0, 4.0, 12.0):
        for delta in (1e-3, 1e-5, 1e-9):
            found = gdp_epsilon(mu, delta)
            assert found == pytest.approx(get_epsilon_gaussian(1 / mu, delta), abs=2e-5)
            assert gdp_delta(mu, found) >= delta * (1 - 1e-9), "from below"
    assert gdp_epsilon(0.0, 1e-5) == 0
    assert gdp_epsilon(1e-6, 1e-5) == 0


def test_clopper_pearson_is_the_binomial_tail():
    upper = clopper_pearson_upper(np.array([0, 3, 20]), 20, 0.025)
    assert binom.cdf(0, 20, upper[0]) == pytest.approx(0.025)
    assert binom.cdf(3, 20, upper[1]) == pytest.approx(0.025)
    assert upper[2] == 1


def test_guesses_by_hand():
    scores = np.array([0.1, 5.0, -3.0, 4.0, 0.0, -1.0])
    coins = np.array([False, True, False, False, True, True])
    assert one_run_guesses(scores, coins, 1) == (2, 2)
    assert one_run_guesses(scores, coins, 2) == (4, 2)
    assert one_run_guesses(scores, coins, 99) == (6, 2), "at most half on each side"


def test_scores_that_say_nothing_prove_nothing():
    rng = np.random.default_rng(3)
    coins = rng.random(1000) < 0.5
    for scores in (np.zeros(1000), np.full(1000, np.nan), rng.standard_normal(1000)):
        assert all(bound.epsilon == 0 for bound in lower_bounds(scores, coins, 1e-5))


def test_what_a_bound_says_of_itself():
    rng = np.random.default_rng(0)
    coins = rng.random(500) < 0.5
    bounds = lower_bounds(coins + rng.standard_normal(500), coins, 1e-5, confidence=0.9)
    assert [b.name for b in bounds] == ["steinke", "f-dp", "cp-gdp"]
    assert [len(b.assumptions) for b in bounds] == [1, 2, 3]
    assert all(b.canaries == 500 and b.confidence == 0.9 for b in bounds)
    assert bounds[0].guesses in {2 * int(fraction * 500) for fraction in FRACTIONS}
    assert bounds[2].guesses == 250


def test_more_confidence_means_a_lower_bound():
    rng = np.random.default_rng(0)
    coins = rng.random(1000) < 0.5
    scores = coins + rng.standard_normal(1000)
    for low, high in zip(lower_bounds(scores, coins, 1e-5, 0.999), lower_bounds(scores, coins, 1e-5, 0.9), strict=True):
        assert low.epsilon <= high.epsilon


def test_arguments_out_of_range():
    coins = np.array([True, False])
    with pytest.raises(ValueError, match="one score and one coin"):
        lower_bounds(np.zeros(3), coins, 1e-5)
    with pytest.raises(ValueError, match=r"delta must be in \(0, 1\)"):
        lower_bounds(np.zeros(2), coins, 0.0)
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
        lower_bounds(np.zeros(2), coins, 1e-5, confidence=1.0)
    with pytest.raises(ValueError, match="right <= guesses"):
        steinke_p_value(5, 6, 2, 1.0, 0.0)
