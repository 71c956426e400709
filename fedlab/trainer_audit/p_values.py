"""Exact or nearly exact p-values for what a correct DP-SGD releases. Two-sided where both directions are wrong.

All arguments are what was observed, then what is claimed; all results lie in [0, 1], 0 for an observation that is not
finite.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def variance_p(squares: float, count: int, std: float) -> float:
    """Sum of ``count`` squares of independent N(0, std²): χ² with ``count`` degrees, exact, two-sided."""
    return _two_sided(stats.chi2(count), squares / std**2)


def shape_p(standardised: np.ndarray) -> float:
    """Kolmogorov and Smirnov's test that values are independent N(0, 1)."""
    return float(stats.kstest(standardised, "norm").pvalue)


def correlation_p(r: np.ndarray, count: int) -> np.ndarray:
    """Pearson correlations of ``count`` independent Gaussian pairs each: r·√((k − 2)/(1 − r²)) is Student's t, exact,
    two-sided.

    NaN (a constant vector) says nothing: 1.
    """
    r = np.nan_to_num(r)
    t = np.abs(r) * np.sqrt((count - 2) / np.maximum(1 - r * r, 1e-300))
    return np.asarray(2 * stats.t(count - 2).sf(t))


def rate_p(hits: int, trials: int, q: float) -> float:
    """``hits`` among ``trials`` independent coins of probability q: binomial, exact, two-sided."""
    return min(1.0, 2 * min(float(stats.binom.cdf(hits, trials, q)), float(stats.binom.sf(hits - 1, trials, q))))


def dispersion(counts: np.ndarray, trials: int, q: float) -> tuple[float, float]:
    """(variance of the counts relative to Bin(T, q), p), 0 < q < 1.

    Σ (c − Tq)²/(Tq(1 − q)) over N counts has mean N and variance N·(2 + excess kurtosis); it is taken for a gamma with
    those moments.
    """
    variance = trials * q * (1 - q)
    statistic = float(np.square(counts - trials * q).sum()) / variance
    spread = 2 + (1 - 6 * q * (1 - q)) / variance
    return statistic / len(counts), _two_sided(stats.gamma(len(counts) / spread, scale=spread), statistic)


def overlap_p(shared: int, n: int, q: float) -> float:
    """Two independent Poisson batches of n records have ``shared`` or more in common: binomial with q², exact,
    one-sided.
    """
    return float(stats.binom.sf(shared - 1, n, q * q))


def _two_sided(law: stats.rv_frozen, value: float) -> float:
    return min(1.0, 2 * min(float(law.cdf(value)), float(law.sf(value)))) if math.isfinite(value) else 0.0
