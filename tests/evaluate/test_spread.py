"""Mean, worst and spread over clients."""

from __future__ import annotations

from fedlab.evaluate import spread


def test_spread_ignores_clients_without_examples():
    assert spread([0.5, 1.0, float("nan")], higher=True) == {"mean": 0.75, "worst": 0.5, "std": 0.25}
    assert spread([0.5, 1.0, float("nan")], higher=False) == {"mean": 0.75, "worst": 1.0, "std": 0.25}
    assert spread([], higher=True) == {"mean": None, "worst": None, "std": None}
