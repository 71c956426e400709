"""How well a stream of tasks was learnt and kept. One sign convention: higher is better for every transfer, forgetting
is a loss.

``R`` is [T, T]: R[t, i] is the score on task i after training task t (0-based), NaN where it was not measured (tasks
not yet seen). A number that is not defined (backward transfer of one task, a row with holes) is NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

Matrix = np.ndarray


def average_score(R: Matrix) -> float:
    """AA = mean over i of R[T−1, i]: all tasks, after the last one (GEM, arXiv 1706.08840)."""
    return float(_square(R)[-1].mean())


def average_incremental_score(R: Matrix) -> float:
    """Mean over t of the average score on the tasks seen until t."""
    R = _square(R)
    return float(np.mean([R[t, : t + 1].mean() for t in range(len(R))]))


def learning_score(R: Matrix) -> float:
    """LA, plasticity: mean over i of R[i, i], each task just after it was trained."""
    return float(np.diag(_square(R)).mean())


def backward_transfer(R: Matrix) -> float:
    """BWT = mean over i < T−1 of R[T−1, i] − R[i, i] (GEM, T − 1 terms). Negative: forgetting. NaN for one task."""
    R = _square(R)
    return float((R[-1, :-1] - np.diag(R)[:-1]).mean()) if len(R) > 1 else math.nan


def forgetting(R: Matrix) -> float:
    """F = mean over i < T−1 of (max over i <= l < T−1 of R[l, i]) − R[T−1, i] (Chaudhry et al., arXiv 1801.10112).

    At least −BWT.
    """
    R = _square(R)
    last = len(R) - 1
    return float(np.mean([R[i:last, i].max() - R[last, i] for i in range(last)])) if last else math.nan


def forward_transfer(R: Matrix, before: Iterable[float], higher: bool = True) -> float:
    """FWT = mean over i >= 1 of R[i−1, i] − before[i] (GEM), its sign turned unless ``higher`` scores are better.

    ``before``: scores before any task. NaN unless unseen tasks were measured.
    """
    R, b = _square(R), np.asarray(list(before), dtype=float)
    if b.shape != (len(R),):
        raise ValueError(f"before has shape {b.shape}, want ({len(R)},)")
    gain = float(np.mean([R[i - 1, i] - b[i] for i in range(1, len(R))])) if len(R) > 1 else math.nan
    return gain if higher else -gain


def worst_share(values: Iterable[float], higher: bool = True, share: float = 0.1) -> float:
    """Mean of the worst ``share`` of the values (at least one of them); NaN of none. NaN values are left out.

    ``higher``: whether higher values are better.
    """
    found = np.sort([v for v in values if not math.isnan(v)])[:: 1 if higher else -1]
    return float(found[: max(1, round(share * len(found)))].mean()) if len(found) else math.nan


def summary(R: Matrix, higher: bool = True) -> dict[str, float]:
    """All of the above that R alone defines. AA = LA + ((T − 1)/T)·BWT holds among them, where higher is better.

    ``higher``: whether higher scores are better. If not, transfers and forgetting are those of −R, so that their signs
    mean the same.
    """
    signed = np.asarray(R, dtype=float) * (1 if higher else -1)
    return {
        "average_score": average_score(R),
        "average_incremental_score": average_incremental_score(R),
        "learning_score": learning_score(R),
        "backward_transfer": backward_transfer(signed),
        "forgetting": forgetting(signed),
    }


def _square(R: Matrix) -> Matrix:
    R = np.asarray(R, dtype=float)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not len(R):
        raise ValueError(f"R has shape {R.shape}, want [T, T] with T >= 1")
    return R
