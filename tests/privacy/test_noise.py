"""Noise: its distribution, its tails, and who can repeat it."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from fedlab.privacy.noise import SecureNoise, SecureStream, SeededNoise, box_muller
from fedlab.seeds import random_stream


def sources():
    return [SeededNoise(random_stream(0, "noise", "client-0", 1)), SecureNoise()]


@pytest.mark.parametrize("source", sources(), ids=lambda s: s.name)
def test_distribution_is_gaussian_in_float64_with_the_asked_deviation(source):
    drawn = source.draw((500, 401), 3.0)
    assert drawn.dtype == torch.float64
    assert drawn.shape == (500, 401)
    values = drawn.flatten().numpy() / 3.0
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert abs(values.std() - 1) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01


def test_the_transform_reaches_beyond_the_tail_that_float32_cuts():
    """PyTorch's float32 normal stops at 5.77 σ; here the smallest uniform of 53 bits gives 8.57."""
    assert float(np.abs(box_muller(np.array([2.0**-53]), np.array([1.0]))).max()) == pytest.approx(8.57, abs=0.01)
    assert np.isfinite(box_muller(np.array([1.0, 2.0**-53]), np.array([2.0**-53, 1.0]))).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53], ids=["least", "greatest"])
def test_the_ends_of_the_key_stream_give_finite_noise(uniform: float, monkeypatch: pytest.MonkeyPatch):
    """Once in 2⁵³ numbers: an infinite entry would say that nothing was hidden."""
    monkeypatch.setattr(SecureNoise, "random", lambda self, size: np.full(size, uniform))
    assert torch.isfinite(SecureNoise().draw((5,), 2.0)).all()


def test_quantiles_of_the_transform_are_exact():
    grid = (np.arange(1, 20001) - 0.5) / 20000
    u, v = (a.ravel() for a in np.meshgrid(grid[::100], grid[::100]))
    assert stats.kstest(box_muller(u, v), "norm").statistic < 0.01


def test_seeded_noise_repeats_and_other_streams_differ():
    a, b, c = (
        SeededNoise(random_stream(5, "noise", client, 2)).draw((8,), 1.0)
        for client in ("client-1", "client-1", "client-2")
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_secure_noise_never_repeats_and_no_seed_reaches_it():
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    first = SecureNoise().draw((64,), 1.0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    second = SecureNoise().draw((64,), 1.0)
    assert not torch.equal(first, second)
    source = SecureNoise()
    assert not torch.equal(source.draw((64,), 1.0), source.draw((64,), 1.0))


def test_secure_noise_cannot_be_copied():
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            duplicate(SecureNoise())


def test_secure_noise_refuses_to_be_carried_across_a_fork(monkeypatch: pytest.MonkeyPatch):
    source = SecureNoise()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="across a fork"):
        source.draw((3,), 1.0)


def test_a_secure_stream_is_uniform_on_the_half_open_interval():
    drawn = SecureStream().random(200_001)
    assert drawn.shape == (200_001,)
    assert stats.kstest(drawn, "uniform").pvalue > 1e-4
    assert drawn.min() >= 0
    assert drawn.max() < 1


@pytest.mark.parametrize("source", sources(), ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
def test_shapes_and_zero_deviation(source, shape: tuple[int, ...]):
    assert source.draw(shape, 1.0).shape == shape
    assert torch.equal(source.draw(shape, 0.0), torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="std"):
        source.draw(shape, -1.0)
