"""Shares of noise: what they add up to, what one example moves, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlab.errors import ConfigError, PrivacyError
from fedlab.privacy.noise import SecureStream
from fedlab.privacy.noise_share import NoiseShare
from fedlab.privacy.plan import DPPlan

SHARE = NoiseShare(survivors=4, colluding=1)
PLAN = DPPlan(
    n=50, batch_size=32, steps=1, sigma=0.8, clip=0.5, delta=1e-5, participations=3, noise="seeded", rate=0.2,
    shared=SHARE,
)  # fmt: skip


def zeros(*shape: int) -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(*shape, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)}


def test_a_share_is_never_less_than_the_honest_ones_need():
    """In exact arithmetic: share² · (survivors − colluding) ≥ (σ·(2^20 + √d))²."""
    for survivors, colluding, sigma, d in ((4, 1, 0.8, 10), (3, 0, 1.1, 300_000), (1000, 333, 0.5, 7), (2, 1, 3.3, 1)):
        std = Fraction(NoiseShare(survivors, colluding).std(sigma, d))
        root = Fraction(math.isqrt(d * 10**40) + 1, 10**20)  # above √d
        assert std**2 * (survivors - colluding) >= (Fraction(sigma) * (2**20 + root)) ** 2 * (1 - Fraction(1, 10**19))
        assert std**2 * (survivors - colluding) <= (Fraction(sigma) * (2**20 + root)) ** 2 * (1 + Fraction(1, 10**14))


@pytest.mark.parametrize("clients", [3, 4])
def test_the_decoded_sum_of_the_fewest_survivors_has_the_claimed_variance(clients: int):
    """With all four there is more than claimed; of the three honest ones alone there is what is claimed."""
    d, rng = 20_003, np.random.default_rng(0)
    total = sum(PLAN.share_of(zeros(20_000), d, PLAN.noise_words(rng))["a"] for _ in range(clients))
    decoded = SHARE.decode(total, PLAN.clip)
    claimed = PLAN.sigma * PLAN.clip * (1 + math.sqrt(d) / 2**20) * math.sqrt(clients / SHARE.honest)
    assert abs(decoded.std() / claimed - 1) < 4.5 / math.sqrt(2 * len(decoded))
    assert stats.kstest(decoded / claimed, "norm").pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_one_example_moves_the_rounded_sum_by_no_more_than_is_said(seed: int, d: int, clip: float):
    rng = np.random.default_rng(seed)
    rest = rng.normal(size=d) * clip * rng.choice([1e-9, 1, 20])
    one = rng.normal(size=d)
    one *= clip * (1 - 2.0**-20) / np.linalg.norm(one)
    moved = SHARE.encode(rest + one, clip, 1e4 * clip) - SHARE.encode(rest, clip, 1e4 * clip)
    assert np.linalg.norm(moved.astype(float)) <= SHARE.sensitivity(d)


def test_encoding_loses_at_most_half_a_step_and_decodes_sums_exactly():
    values = np.random.default_rng(1).normal(size=(5, 100))
    encoded = [SHARE.encode(v, 0.5, 100.0) for v in values]
    assert np.abs(SHARE.decode(encoded[0], 0.5) - values[0]).max() <= SHARE.grid(0.5) / 2
    assert np.array_equal(SHARE.decode(sum(encoded), 0.5), sum(SHARE.decode(e, 0.5) for e in encoded))


@pytest.mark.parametrize("value", [math.nan, math.inf, 26.0])
def test_what_is_no_sum_of_clipped_gradients_is_not_shared(value: float):
    broken = zeros(4)
    broken["a"][2] = value
    with pytest.raises(PrivacyError, match="nothing is released"):
        PLAN.share_of(broken, 10, PLAN.noise_words(np.random.default_rng(0)))


def test_an_empty_batch_is_noise_like_any_other():
    share = PLAN.share_of(zeros(2, 2), 7, SecureStream())
    assert share["a"].shape == (2, 2)
    assert share["a"].dtype == np.int64
    assert np.count_nonzero(share["a"]) == 4


def test_more_coordinates_than_were_signed_are_refused():
    with pytest.raises(PrivacyError, match="the signed scope has 6"):
        PLAN.share_of(zeros(2, 2), 6, SecureStream())


def test_a_part_of_the_scope_gets_the_noise_of_the_whole():
    assert SHARE.std(0.8, 10**6) > SHARE.std(0.8, 7)
    draws = [PLAN.share_of(zeros(2, 2), d, PLAN.noise_words(np.random.default_rng(5)))["a"] for d in (7, 10**12)]
    assert np.abs(draws[1]).sum() > np.abs(draws[0]).sum()


def test_a_plan_with_shares_does_not_privatise_and_one_without_has_none():
    with pytest.raises(PrivacyError, match="share_of"):
        PLAN.privatise(zeros(2), PLAN.noise_source(np.random.default_rng(0)))
    alone = DPPlan(50, 10, 1, 0.8, 0.5, 1e-5, 3, "seeded")
    with pytest.raises(ValueError, match="privatise"):
        alone.share_of(zeros(2), 5, SecureStream())
    assert alone.shared_terms(5) is None


def test_overflow_is_computed_and_refused():
    SHARE.check_overflow([10**6] * 1000, 1.0, 300_000)
    with pytest.raises(ConfigError, match="there is room for"):
        SHARE.check_overflow([10**10] * 1000, 1.0, 300_000)
    with pytest.raises(ConfigError, match="there is room for"):
        SHARE.check_overflow([100], 1e12, 300_000)


def test_how_far_shares_are_from_one_discrete_gaussian_is_computed_and_refused():
    assert SHARE.check_distance(0.5, 300_000, 1000) == 0.0  # below 1e-300
    assert SHARE.check_distance(1e-9, 300_000, 1) == 0.0  # alone it is one
    coarse = NoiseShare(2, 0, bits=1)
    with pytest.raises(ConfigError, match="do not add up"):
        coarse.check_distance(0.5, 4, 2)
    bound = coarse.check_distance(1.2, 4, 2)
    assert 0 < bound < 1e-30
    # theorem 9 itself, for two shares: 10·exp(−π²s²) per coordinate
    assert bound == pytest.approx(4 * 10 * math.exp(-((math.pi * coarse.std(1.2, 4)) ** 2)))


def test_the_bound_holds_for_two_small_shares():
    """Against the convolution, computed: s = 0.5, where the distance can be seen."""
    s, values = 0.5, np.arange(-40, 41)
    one = np.exp(-(values**2) / (2 * s**2))
    one /= one.sum()
    both = np.convolve(one, one)[40:-40]
    whole = np.exp(-(values**2) / (4 * s**2))
    whole /= whole.sum()
    seen = np.abs(np.log(both[30:51] / whole[30:51])).max()
    assert 1e-3 < seen <= 10 * math.exp(-((math.pi * s) ** 2))


@pytest.mark.parametrize(("survivors", "colluding", "bits"), [(0, 0, 20), (3, 3, 20), (3, -1, 20), (3, 0, 0)])
def test_arguments(survivors: int, colluding: int, bits: int):
    with pytest.raises(ValueError, match=r"survivors|colluding|bits"):
        NoiseShare(survivors, colluding, bits)
