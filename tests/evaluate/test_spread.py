"""Mean, worst, worst tenth and spread over clients."""

from __future__ import annotations

import numpy as np
import pytest

from fedlab.evaluate import spread, worst_first

NAN = float("nan")


def test_spread_ignores_clients_without_examples():
    found = {"mean": 0.75, "worst": 0.5, "worst_decile": 0.5, "std": 0.25}
    assert spread([0.5, 1.0, NAN], higher=True) == found
    assert spread([0.5, 1.0, NAN], higher=False) == {**found, "worst": 1.0, "worst_decile": 1.0}
    assert spread([], higher=True) == dict.fromkeys(found)


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (10, 1), (11, 2), (30, 3), (101, 11)])
def test_the_worst_tenth_is_rounded_up_to_whole_clients(clients: int, worst: int):
    scores = np.random.default_rng(clients).permutation(clients) / clients
    assert spread(scores, higher=True)["worst_decile"] == pytest.approx(np.sort(scores)[:worst].mean())
    assert spread(scores, higher=False)["worst_decile"] == pytest.approx(np.sort(scores)[-worst:].mean())


def test_the_curve_begins_with_the_worst():
    assert worst_first([0.5, NAN, 0.2, 0.9], higher=True) == [0.2, 0.5, 0.9]
    assert worst_first([0.5, NAN, 0.2, 0.9], higher=False) == [0.9, 0.5, 0.2]
