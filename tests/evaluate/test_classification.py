"""Scores against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from fedlab.evaluate.classification import accuracy_and_f1

pairs = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


@given(pairs)
def test_accuracy_and_macro_f1_are_scikit_learns(drawn: list[tuple[int, int]]):
    labels, predicted = (np.array(column) for column in zip(*drawn, strict=True))
    accuracy, macro_f1 = accuracy_and_f1(predicted, labels)
    present = sorted(set(labels.tolist()))  # scikit-learn would also average over classes that were only guessed
    assert accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert macro_f1 == pytest.approx(f1_score(labels, predicted, labels=present, average="macro", zero_division=0))
