"""Poisson batches are Poisson; fixed ones are fixed."""

from __future__ import annotations

import numpy as np
import pytest

from fedlab.privacy.sampling import fixed_batches, poisson_batch
from fedlab.seeds import random_stream


def test_poisson_batches_have_binomial_sizes_and_independent_members():
    n, q, steps = 400, 0.05, 3000
    rng = random_stream(1, "t")
    member = np.zeros((steps, n), dtype=bool)
    for step in range(steps):
        member[step, poisson_batch(n, q, rng)] = True
    sizes = member.sum(1)
    assert abs(sizes.mean() - n * q) < 4 * np.sqrt(n * q * (1 - q) / steps)
    assert sizes.var() == pytest.approx(n * q * (1 - q), rel=0.15), "a fixed size, or a shuffle, has no such variance"
    counts = member.sum(0)
    assert counts.var() == pytest.approx(steps * q * (1 - q), rel=0.3), "a shuffle gives every example the same count"


def test_poisson_edges():
    rng = random_stream(1, "t")
    assert len(poisson_batch(5, 0.0, rng)) == 0
    assert poisson_batch(5, 1.0, rng).tolist() == [0, 1, 2, 3, 4]
    for n, q in ((0, 0.5), (5, 1.5), (5, float("nan"))):
        with pytest.raises(ValueError, match=r"n|q"):
            poisson_batch(n, q, rng)


def test_fixed_batches_cover_the_data_before_repeating():
    batches = fixed_batches(10, 3, 7, random_stream(1, "t"))
    assert len(batches) == 7
    assert all(len(set(b.tolist())) == 3 for b in batches)
    assert len(set(np.concatenate(batches[:3]).tolist())) == 9
    assert [len(b) for b in fixed_batches(4, 10, 2, random_stream(1, "t"))] == [4, 4]
