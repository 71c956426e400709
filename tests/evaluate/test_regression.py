"""Correlations and errors against scipy and scikit-learn, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from fedlab.evaluate.regression import pearson, ranks, scores_of

numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False))
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=40)


@given(pairs)
def test_scores_are_those_of_scipy_and_scikit_learn(drawn: list[tuple[float, float]]):
    found, labels = (np.array(column) for column in zip(*drawn, strict=True))
    scores = scores_of(found, labels)
    assert scores["rmse"] == pytest.approx(root_mean_squared_error(labels, found))
    assert scores["mae"] == pytest.approx(mean_absolute_error(labels, found))
    assert ranks(found).tolist() == stats.rankdata(found).tolist()
    if len(set(found)) > 1 and len(set(labels)) > 1:
        assert scores["spearman"] == pytest.approx(stats.spearmanr(found, labels).statistic, abs=1e-9)
        if min(np.ptp(found), np.ptp(labels)) > 1e-3:
            assert scores["pearson"] == pytest.approx(stats.pearsonr(found, labels).statistic, abs=1e-6)


def test_a_constant_correlates_with_nothing_and_tiny_numbers_do():
    line = np.array([1.0, 2.0, 3.0])
    assert math.isnan(pearson(line, np.ones(3)))
    assert math.isnan(pearson(np.array([1.0, np.nan, 2.0]), line))
    assert pearson(1e-300 * line, -1e200 * line) == pytest.approx(-1.0)
