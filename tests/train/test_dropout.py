"""Adapter dropout: masks of the right rate, each example's own, the same whatever they are padded to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from fedlab.train.dropout import Masks, keep, row_keys


def keys(count: int, seed: int = 1, step: int = 0) -> torch.Tensor:
    return torch.from_numpy(row_keys(seed, step, np.arange(count)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_rate_is_met_along_every_axis(rate: float):
    kept = keep(keys(64), "layer", 32, 48, rate).double()
    assert kept.mean().item() == pytest.approx(1 - rate, abs=0.005)
    deviation = (rate * (1 - rate)) ** 0.5
    for axis, size in (((1, 2), 32 * 48), ((0, 2), 64 * 48), ((0, 1), 64 * 32)):
        assert float((kept.mean(axis) - (1 - rate)).abs().max()) < 5 * deviation / size**0.5


def test_neighbouring_entries_examples_steps_and_modules_are_independent():
    def bits(*, seed: int = 1, step: int = 0, module: str = "a", shift: int = 0) -> np.ndarray:
        return np.roll(keep(keys(50, seed, step), module, 20, 30, 0.5).numpy().astype(int).ravel(), shift)

    first = bits()
    for other in (bits(shift=1), bits(shift=30), bits(shift=600), bits(step=1), bits(seed=2), bits(module="b")):
        table = np.bincount(2 * first + other, minlength=4)
        assert chisquare(table).pvalue > 1e-4


def test_padding_changes_nothing_and_every_example_has_its_own_key():
    long, short = keep(keys(5), "m", 40, 8, 0.3), keep(keys(5), "m", 7, 8, 0.3)
    assert torch.equal(long[:, :7], short)
    assert len(np.unique(row_keys(9, 3, np.arange(20000)))) > 19990
    assert not np.array_equal(row_keys(9, 3, np.arange(10)), row_keys(9, 4, np.arange(10)))


def test_what_is_kept_is_scaled_and_a_row_too_many_is_an_error():
    masks = Masks(0.25, keys(3))
    scale = masks.scale(torch.ones(3, 4, 5), "m")
    assert scale.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert masks.scale(torch.ones(3, 5), "m").shape == (3, 5)
    with pytest.raises(RuntimeError, match="4 rows, but 3 examples"):
        masks.scale(torch.ones(4, 4, 5), "m")
