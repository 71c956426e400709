import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlab.continual import metrics as m

NAN = math.nan
R = np.array([[0.8, NAN, NAN], [0.5, 0.7, NAN], [0.6, 0.4, 0.9]])


def test_the_definitions_by_hand():
    assert m.average_score(R) == pytest.approx((0.6 + 0.4 + 0.9) / 3)
    assert m.learning_score(R) == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert m.backward_transfer(R) == pytest.approx((-0.2 - 0.3) / 2)
    assert m.forgetting(R) == pytest.approx((0.2 + 0.3) / 2)
    assert m.average_incremental_score(R) == pytest.approx((0.8 + 0.6 + (1.9 / 3)) / 3)
    assert m.summary(R)["forgetting"] == m.forgetting(R)


def test_where_lower_is_better_the_signs_mean_the_same():
    found, turned = m.summary(R), m.summary(1 - R, higher=False)
    for name in ("backward_transfer", "forgetting"):
        assert turned[name] == pytest.approx(found[name])
    assert turned["average_score"] == pytest.approx(1 - found["average_score"])
    full = np.array([[0.8, 0.3], [0.5, 0.7]])
    assert m.forward_transfer(1 - full, [0.9, 0.9], higher=False) == pytest.approx(m.forward_transfer(full, [0.1, 0.1]))
    assert m.worst_share([0.5, 0.2, 0.9], higher=False) == 0.9


def test_a_peak_in_between_counts_as_forgotten_but_not_as_backward_transfer():
    peak = np.array([[0.5, NAN, NAN], [0.9, 0.5, NAN], [0.5, 0.5, 0.5]])
    assert m.backward_transfer(peak) == 0
    assert m.forgetting(peak) == pytest.approx(0.2)


def test_one_task_transfers_nothing_and_that_is_not_zero():
    one = np.array([[0.7]])
    assert m.average_score(one) == m.learning_score(one) == pytest.approx(0.7)
    assert math.isnan(m.backward_transfer(one))
    assert math.isnan(m.forgetting(one))
    assert math.isnan(m.forward_transfer(one, [0.1]))


def test_forward_transfer_needs_scores_on_tasks_before_they_came():
    assert math.isnan(m.forward_transfer(R, [0.1, 0.1, 0.1]))
    full = np.array([[0.8, 0.3, 0.1], [0.5, 0.7, 0.2], [0.6, 0.4, 0.9]])
    assert m.forward_transfer(full, [0.1, 0.1, 0.1]) == pytest.approx((0.2 + 0.1) / 2)


def test_holes_are_not_numbers():
    assert math.isnan(m.average_score(np.array([[0.5, NAN], [NAN, 0.5]])))


@given(st.integers(1, 6).flatmap(lambda t: arrays(float, (t, t), elements=st.floats(0, 1))))
def test_what_is_kept_is_what_was_learnt_plus_backward_transfer(full):
    t = len(full)
    backward = m.backward_transfer(full) if t > 1 else 0.0
    assert m.average_score(full) == pytest.approx(m.learning_score(full) + (t - 1) / t * backward, abs=1e-12)
    if t > 1:
        assert m.forgetting(full) >= -m.backward_transfer(full) - 1e-12


def test_the_worst_share_is_at_least_one_client():
    assert m.worst_share([0.5, 0.2, 0.9]) == 0.2
    assert m.worst_share([*np.linspace(0, 1, 20), NAN]) == pytest.approx((0 + 1 / 19) / 2)
    assert math.isnan(m.worst_share([]))


@pytest.mark.parametrize("shape", [(2, 3), (0, 0), (3,)])
def test_a_matrix_is_square(shape):
    with pytest.raises(ValueError, match="shape"):
        m.average_score(np.zeros(shape))
