"""From canary scores to lower bounds on ε. Pure arithmetic: nothing here trains, draws noise or knows a model.

An audit puts m canaries before a mechanism, each included by its own fair coin, and gives each a score: high where the
release looks as if the canary was in. A bound says: a mechanism with a smaller ε would produce scores this telling with
probability at most 1 − confidence. So a bound above the claimed ε refutes the claim (wrongly in at most 1 − confidence
of all audits); a bound below it proves nothing.

| bound | assumes | paper |
|---|---|---|
| ``steinke`` | nothing beyond the coins | Steinke, Nasr and Jagielski, arXiv 2305.08846 |
| ``f-dp`` | the trade-off curve is a Gaussian's (µ-GDP) | Mahloujifar, Melis and Chaudhuri, arXiv 2410.22235 |
| ``cp-gdp`` | that, and independent scores | Clopper and Pearson (1934) on the two error rates; Dong et al., arXiv 1905.02383 |

Guesses of the first two: the k highest scores are guessed in, the k lowest out, the rest abstained from. Any rule that
looks at the release alone is allowed, but not one that looks at how many were right. So the few k are fractions of m
fixed beforehand (``FRACTIONS``), each tested at (1 − confidence)/len(FRACTIONS): the best of them holds at
``confidence`` by the union bound. With all r guesses right the Steinke bound is logit(α^(1/r)) at most, α the level of
one test; no audit of r guesses can prove more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import beta, binom

from fedlab._validate import non_negative, positive, probability

FRACTIONS = (0.02, 0.08, 0.2)  # k/m, guessed on each side: few sure guesses for large ε, many unsure ones for small ε
MOST = 100.0  # no bound is searched for above this ε or µ
COINS = "each canary was included by an independent fair coin"
GDP = (
    "the mechanism's trade-off curve is a Gaussian's (exact for one Gaussian release at q = 1, an approximation for q"
    " < 1)"
)
INDEPENDENT = "scores are independent given the coins (orthogonal canaries under isotropic noise)"


@dataclass(frozen=True)
class Bound:
    """ε ≥ ``epsilon`` holds at ``confidence``, if the assumptions do. 0 means that nothing was shown."""

    name: str
    epsilon: float
    confidence: float
    canaries: int
    guesses: int  # of the best k for the one-run bounds; canaries in the counting half for cp-gdp
    assumptions: tuple[str, ...]


def lower_bounds(
    scores: np.ndarray, included: np.ndarray, delta: float, confidence: float = 0.95, seed: int = 0
) -> tuple[Bound, ...]:
    """The three bounds, each at ``confidence`` by itself (together, by the union bound, at 1 − 3·(1 − confidence)).

    Args:
        scores: [m] float, m >= 2, one per canary; higher means "in". NaN counts as no evidence and is ranked in the
        middle. included: [m] bool, the coins. delta: in (0, 1). confidence: in (0, 1). seed: of the split into halves
        for ``cp-gdp``; independent of the scores.

    Raises ValueError for arguments out of range.
    """
    scores, included = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    if scores.ndim != 1 or scores.shape != included.shape or len(scores) < 2:
        raise ValueError(
            f"want one score and one coin per canary, at least two; got {scores.shape} and {included.shape}"
        )
    _open_interval(delta=delta)
    _open_interval(confidence=confidence)
    if np.isnan(scores).any():
        finite = scores[~np.isnan(scores)]
        scores = np.where(np.isnan(scores), np.median(finite) if len(finite) else 0.0, scores)
    m, level = len(scores), (1 - confidence) / len(FRACTIONS)
    tried = [one_run_guesses(scores, included, max(1, int(fraction * m))) for fraction in FRACTIONS]
    steinke = max((steinke_epsilon(m, guesses, right, delta, 1 - level), guesses) for guesses, right in tried)
    fdp = max((fdp_mu(m, guesses, right, 1 - level), guesses) for guesses, right in tried)
    half = np.random.default_rng(seed).permutation(m) < m // 2
    mu = clopper_pearson_mu(scores[half], included[half], scores[~half], included[~half], confidence)
    return (
        Bound("steinke", steinke[0], confidence, m, steinke[1], (COINS,)),
        Bound("f-dp", gdp_epsilon(fdp[0], delta), confidence, m, fdp[1], (COINS, GDP)),
        Bound("cp-gdp", gdp_epsilon(mu, delta), confidence, m, int((~half).sum()), (COINS, GDP, INDEPENDENT)),
    )


def one_run_guesses(scores: np.ndarray, included: np.ndarray, k: int) -> tuple[int, int]:
    """(guesses, right ones) when the k highest scores are guessed in and the k lowest out; k >= 1, at most half of the
    canaries.

    Ties are broken by position, which the coins do not move.
    """
    positive(k=k)
    k = min(k, len(scores) // 2)
    order = np.argsort(scores, kind="stable")
    return 2 * k, int(included[order[len(order) - k :]].sum() + (~included[order[:k]]).sum())


def steinke_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Probability, at most, of ``right`` or more right guesses under (ε, δ)-DP:

    P[Bin(r, p) ≥ v] + 2mδ·max over i of P[v > Bin(r, p) ≥ v − i]/i,  p = e^ε/(1 + e^ε). In [0, 1]; 1 where v = 0.
    """
    positive(canaries=canaries)
    non_negative(epsilon=epsilon)
    probability(delta=delta)
    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"want 0 <= right <= guesses <= canaries, got {right}, {guesses}, {canaries}")
    if right == 0:
        return 1.0
    below = binom.cdf(np.arange(-1, right), guesses, 1 / (1 + math.exp(-epsilon)))  # P[Bin <= j], j = −1 … v − 1
    i = np.arange(1, right + 1)
    slack = float(((below[-1] - below[-1 - i]) / i).max())
    return min(1.0, float(1 - below[-1]) + 2 * canaries * delta * slack)


def steinke_epsilon(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """Largest ε that ``steinke_p_value`` rejects; 0 if it rejects none."""
    return _largest(lambda epsilon: steinke_p_value(canaries, guesses, right, epsilon, delta) < 1 - confidence)


def fdp_mu(canaries: int, guesses: int, right: int, confidence: float) -> float:
    """Largest µ for which µ-GDP is rejected by v right of c guesses over m canaries; 0 if none is.

    With α = 1 − confidence, r = α·v/m and h = α·(c − v)/m bound from below, under µ-GDP, the weight that more than i
    right guesses must have; for i = v − 1 … 0: h' = max(h, Φ(Φ⁻¹(r) − µ)), r' = r + i/(c − i)·(h' − h). µ is impossible
    if at last r + h > c/m.
    """
    if not 0 <= right <= guesses <= canaries or guesses == 0:
        raise ValueError(f"want 0 <= right <= guesses <= canaries and a guess, got {right}, {guesses}, {canaries}")
    _open_interval(confidence=confidence)
    alpha, limit = 1 - confidence, guesses / canaries

    def rejected(mu: float) -> bool:
        r, h = alpha * right / canaries, alpha * (guesses - right) / canaries
        for i in range(right - 1, -1, -1):
            raised = max(h, float(ndtr(ndtri(r) - mu)))
            r, h = min(1.0, r + i / (guesses - i) * (raised - h)), raised
            if r + h > limit:  # neither ever falls
                return True
        return False

    return _largest(rejected, tolerance=1e-4)


def clopper_pearson_mu(
    scores: np.ndarray, included: np.ndarray, held_scores: np.ndarray, held_included: np.ndarray, confidence: float
) -> float:
    """µ ≥ −Φ⁻¹(FPR) − Φ⁻¹(FNR) with upper confidence limits of both rates, each at (1 − confidence)/2, on the held-out
    half.

    The threshold is the one that is best, by the same formula, on the other half. 0 if a half holds only one kind of
    canary.
    """
    _open_interval(confidence=confidence)
    alpha = (1 - confidence) / 2

    def mu(thresholds: np.ndarray, values: np.ndarray, coins: np.ndarray) -> np.ndarray:
        inside, outside = np.sort(values[coins]), np.sort(values[~coins])
        false_positives = len(outside) - np.searchsorted(outside, thresholds, side="left")
        false_negatives = np.searchsorted(inside, thresholds, side="left")
        upper_fpr = clopper_pearson_upper(false_positives, len(outside), alpha)
        upper_fnr = clopper_pearson_upper(false_negatives, len(inside), alpha)
        return np.asarray(-ndtri(upper_fpr) - ndtri(upper_fnr))

    if any(not coins.any() or coins.all() for coins in (included, held_included)):
        return 0.0
    candidates = np.unique(scores)
    best = candidates[int(np.argmax(mu(candidates, scores, included)))]
    return float(np.clip(mu(np.array([best]), held_scores, held_included)[0], 0.0, MOST))


def clopper_pearson_upper(hits: np.ndarray, trials: int, alpha: float) -> np.ndarray:
    """Exact upper limit of a binomial rate at level alpha: the rate at which so few hits have probability alpha; 1 if
    all hit.
    """
    hits = np.asarray(hits)
    return np.where(hits >= trials, 1.0, beta.ppf(1 - alpha, hits + 1, np.maximum(trials - hits, 1)))


def gdp_delta(mu: float, epsilon: float) -> float:
    """δ(ε) of µ-GDP: Φ(−ε/µ + µ/2) − e^ε·Φ(−ε/µ − µ/2) (Balle and Wang, arXiv 1805.06530); µ > 0."""
    positive(mu=mu)
    return float(ndtr(-epsilon / mu + mu / 2) - math.exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2))))


def gdp_epsilon(mu: float, delta: float) -> float:
    """ε at which µ-GDP has ``delta``, from below; 0 for µ = 0 or where δ alone covers it."""
    non_negative(mu=mu)
    _open_interval(delta=delta)
    if mu == 0:
        return 0.0
    return _largest(lambda epsilon: gdp_delta(mu, epsilon) > delta, most=mu * mu / 2 + 40 * mu)


def _largest(rejected: Callable[[float], bool], most: float = MOST, tolerance: float = 1e-6) -> float:
    """Largest value in [0, most] that is rejected, from below, where rejection is a lower set;
    0 if 0 is not rejected.
    """
    low, high = 0.0, most
    if not rejected(low):
        return 0.0
    if rejected(high):
        return high
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def _open_interval(**named: float) -> None:
    ((name, value),) = named.items()
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")
