"""Scores of several labels against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import accuracy_score, f1_score

from fedlab.evaluate.multi_label import f1_and_match


@given(st.tuples(st.integers(1, 30), st.integers(2, 5)).flatmap(lambda shape: arrays(bool, (2, *shape))))
def test_scores_are_scikit_learns(drawn: np.ndarray):
    found, labels = drawn
    scores = f1_and_match(found, labels)
    present = np.flatnonzero(labels.any(0))
    macro = f1_score(labels, found, labels=present, average="macro", zero_division=0) if len(present) else 0.0
    assert scores["micro_f1"] == pytest.approx(f1_score(labels, found, average="micro", zero_division=0))
    assert scores["macro_f1"] == pytest.approx(macro)
    assert scores["exact_match"] == pytest.approx(accuracy_score(labels, found))
