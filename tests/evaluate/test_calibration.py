"""Calibration against a loop over bins and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from fedlab.evaluate.calibration import BINS, ece_and_brier


def slow_ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. (2017), eq. 3, one bin after the other."""
    total = 0.0
    for m in range(BINS):
        inside = [
            (row.max(), float(row.argmax() == label))
            for row, label in zip(probabilities, labels, strict=True)
            if m / BINS < row.max() <= (m + 1) / BINS
        ]
        if inside:
            confidence, accuracy = np.mean(inside, axis=0)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(2, 5))
def test_calibration_is_that_of_the_papers(seed: int, count: int, width: int):
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.dirichlet(np.full(width, 0.5), count), rng.integers(width, size=count)
    found = ece_and_brier(probabilities, labels)
    assert found["ece"] == pytest.approx(slow_ece(probabilities, labels))
    wanted = brier_score_loss(labels, probabilities, labels=list(range(width)), scale_by_half=False)
    assert found["brier"] == pytest.approx(wanted)


def test_the_ends_of_bins_and_what_another_task_cannot_be():
    sure = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert ece_and_brier(sure, np.array([0, 1])) == {"ece": 0.0, "brier": 0.0}
    assert ece_and_brier(sure, np.array([1, 1])) == {"ece": 0.5, "brier": 1.0}
