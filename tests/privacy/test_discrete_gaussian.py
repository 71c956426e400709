"""The exact sampler: its distribution, its moments, and that close decisions get as many bits as they need."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

import fedlab.privacy.discrete_gaussian as module
from fedlab.privacy.discrete_gaussian import SeededWords, discrete_gaussian
from fedlab.privacy.noise import SecureStream

STDS = (0.2, 0.5, 1.0, 2.7, 11.3)


def words(seed: int = 0) -> SeededWords:
    return SeededWords(np.random.default_rng(seed))


def probabilities(std: float) -> tuple[np.ndarray, np.ndarray]:
    """Values to 12 σ with their exact probabilities."""
    values = np.arange(-math.ceil(12 * std) - 3, math.ceil(12 * std) + 4)
    weights = np.exp(-(values.astype(float) ** 2) / (2 * std**2))
    return values, weights / weights.sum()


def p_value(drawn: np.ndarray, std: float) -> float:
    """χ² against the exact probabilities; values that are expected fewer than 8 times are taken together."""
    values, chances = probabilities(std)
    counts = np.array([(drawn == v).sum() for v in values])
    assert counts.sum() == len(drawn)  # nothing beyond 12 σ
    common = chances * len(drawn) >= 8
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(chances[common], chances[~common].sum()) * len(drawn)
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1] * observed[:-1].sum() / expected[:-1].sum()
    return float(stats.chisquare(observed, expected).pvalue)


@pytest.mark.parametrize("std", STDS)
def test_values_have_their_exact_probabilities(std: float) -> None:
    assert p_value(discrete_gaussian(200_000, std, words(1)), std) > 1e-3


@pytest.mark.parametrize("std", [0.5, 2.7])
def test_decisions_with_more_bits_have_them_too(std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decision goes the long way: through fractions and decimals."""
    monkeypatch.setattr(module, "ERROR", 1.0)
    assert p_value(discrete_gaussian(3000, std, words(2)), std) > 1e-3


def test_both_ways_decide_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float64 is sure, decimals say the same, so the same words give the same sample."""
    short = discrete_gaussian(500, 12345.6, words(3))
    monkeypatch.setattr(module, "ERROR", 1.0)
    assert np.array_equal(discrete_gaussian(500, 12345.6, words(3)), short)


@pytest.mark.parametrize("std", [3e5, 2.0**31 + 0.5])
def test_large_noise_has_the_moments_of_a_gaussian(std: float) -> None:
    drawn = discrete_gaussian(400_000, std, words(4)) / std
    n = len(drawn)
    assert abs(drawn.mean()) < 4.5 / math.sqrt(n)
    assert abs((drawn**2).mean() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs((drawn**3).mean()) < 4.5 * math.sqrt(15 / n)
    assert abs((drawn**4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert np.abs(drawn).max() > 4  # full tails


def test_low_bits_are_uniform_and_independent_of_the_sign() -> None:
    """A rounded float64 normal fails this: its low bits are zero far from the origin."""
    drawn = discrete_gaussian(200_000, 2.0**36, words(5))[:20_000]
    table = np.array([[((drawn > 0) & (drawn & 3 == bits)).sum(), ((drawn < 0) & (drawn & 3 == bits)).sum()]
                      for bits in range(4)])  # fmt: skip
    assert stats.chi2_contingency(table).pvalue > 1e-3
    assert stats.chisquare(table.sum(1)).pvalue > 1e-3


def test_the_operating_systems_words_serve_too() -> None:
    assert p_value(discrete_gaussian(50_000, 1.5, SecureStream()), 1.5) > 1e-5


def test_seeded_words_repeat_and_no_seed_reaches_secure_ones() -> None:
    assert np.array_equal(discrete_gaussian(100, 9.5, words(6)), discrete_gaussian(100, 9.5, words(6)))
    assert not np.array_equal(discrete_gaussian(100, 9.5, SecureStream()), discrete_gaussian(100, 9.5, SecureStream()))


def test_words_that_hold_nothing_are_continued() -> None:
    """A first word of zeros says only that u < 2^-64; the next ones say where it is."""

    class Zeros(SeededWords):
        first = True

        def words(self, size: int, /) -> np.ndarray:
            found = super().words(size)
            if self.first:
                found = found.copy()
                found[:3], self.first = 0, False
            return found

    drawn = discrete_gaussian(50, 5.0, Zeros(np.random.default_rng(7)))
    assert np.abs(drawn).max() < 5 * 64


def test_arguments() -> None:
    assert discrete_gaussian(0, 1.0, words()).shape == (0,)
    assert discrete_gaussian(3, 1.0, words()).dtype == np.int64
    for std in (0.0, -1.0, math.nan, math.inf, 2.0**41):
        with pytest.raises(ValueError, match="std"):
            discrete_gaussian(1, std, words())
    with pytest.raises(ValueError, match="count"):
        discrete_gaussian(-1, 1.0, words())


@pytest.mark.parametrize("std", [1.0, 2.7])
def test_opendp_draws_from_the_same_distribution(std: float) -> None:
    """A reference that shares no line with ours; two samples, one test."""
    opendp = pytest.importorskip("opendp.prelude")
    opendp.enable_features("contrib")
    space = opendp.vector_domain(opendp.atom_domain(T="i64"), size=4000), opendp.l2_distance(T="f64")
    theirs = np.array(opendp.m.make_gaussian(*space, scale=std)([0] * 4000))
    ours = discrete_gaussian(20_000, std, words(8))
    values = range(-math.ceil(2.5 * std), math.ceil(2.5 * std) + 1)
    table = np.array([[(theirs == v).sum(), (ours == v).sum()] for v in values])
    assert stats.chi2_contingency(table).pvalue > 1e-4
