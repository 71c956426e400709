"""How well scores tell members from others: the area under the curve, the rate at few false alarms, intervals.

Pure arithmetic. Members have high scores.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import beta, rankdata

from fedlab.seeds import random_stream

RESAMPLES = 1000
LEVELS = ((1000, 0.001), (100, 0.01))  # from so many others on, a false-positive rate of so much can be seen


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """P[a member's score is above another's] + ½·P[they are equal]: Mann and Whitney's U/(m·n). m, n >= 1."""
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    return float((ranks.sum() - len(members) * (len(members) + 1) / 2) / (len(members) * len(others)))


def auc_interval(members: np.ndarray, others: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over pairs: ``members[i]`` and ``others[i]`` are drawn together, [m] each."""
    rng, count = random_stream(seed, "membership", "bootstrap"), len(members)
    drawn = [auc(members[i], others[i]) for i in (rng.integers(0, count, count) for _ in range(RESAMPLES))]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def false_alarms(others: int) -> float | None:
    """The false-positive rate at which so many others can be judged; None if they are too few."""
    return next((level for least, level in LEVELS if others >= least), None)


def hits_at(members: np.ndarray, others: np.ndarray, rate: float) -> int:
    """Members above the lowest threshold that at most ``rate`` of the others exceed."""
    allowed = int(rate * len(others) + 1e-9)
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return int((members > threshold).sum())


def clopper_pearson(hits: int, trials: int, confidence: float) -> tuple[float, float]:
    """Exact two-sided limits of a binomial rate (Clopper and Pearson, 1934)."""
    alpha = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(alpha, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - alpha, hits + 1, trials - hits))
    return low, high
