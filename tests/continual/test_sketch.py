import math

import numpy as np
import pytest
import torch

from fedlab.continual.sketch import clipped_grams, noise_floor, privatise
from fedlab.privacy.noise import SeededNoise


def records(count: int = 6, length: int = 5, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "a": torch.randn(count, length, 7, generator=generator),
        "b": torch.randn(count, length, 3, generator=generator),
    }
    mask = (torch.arange(length) < torch.randint(1, length + 1, (count, 1), generator=generator)).long()
    return inputs, mask


def slow(inputs: dict[str, torch.Tensor], mask: torch.Tensor, clip: float) -> dict[str, torch.Tensor]:
    total = {name: torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64) for name, x in inputs.items()}
    for i in range(len(mask)):
        grams = {name: x[i][mask[i] > 0].double().mT @ x[i][mask[i] > 0].double() for name, x in inputs.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grams.values()))
        for name, g in grams.items():
            total[name] += g * min(1.0, clip / norm)
    return total


@pytest.mark.parametrize("clip", [0.5, 20.0, math.inf])
def test_the_sum_is_the_slow_one(clip):
    inputs, mask = records()
    found, _ = clipped_grams(inputs, mask, clip)
    for name, wanted in slow(inputs, mask, clip).items():
        assert torch.allclose(found[name], wanted, rtol=1e-10)


def test_one_record_more_or_less_moves_the_released_triangle_by_at_most_the_clip():
    inputs, mask = records(count=8)
    inputs["a"][3] *= 1e6
    whole, share = clipped_grams(inputs, mask, 2.0)
    assert share > 0
    for i in range(8):
        rest = [j for j in range(8) if j != i]
        without, _ = clipped_grams({n: x[rest] for n, x in inputs.items()}, mask[rest], 2.0)
        moved = math.sqrt(sum(float(torch.triu(whole[n] - without[n]).square().sum()) for n in whole))
        assert moved <= 2.0 + 1e-5


def test_padding_and_broken_records_add_nothing():
    inputs, mask = records()
    wanted, _ = clipped_grams(inputs, mask, 1.0)
    padded = {n: torch.where(mask[..., None] > 0, x, torch.full_like(x, 99.0)) for n, x in inputs.items()}
    broken = {n: torch.cat([x, torch.full_like(x[:1], math.nan)]) for n, x in padded.items()}
    found, _ = clipped_grams(broken, torch.cat([mask, torch.ones_like(mask[:1])]), 1.0)
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-12)


def test_no_record_at_all_is_an_empty_sum():
    found, share = clipped_grams({"a": torch.zeros(0, 4, 3)}, torch.zeros(0, 4), 1.0)
    assert torch.equal(found["a"], torch.zeros(3, 3, dtype=torch.float64))
    assert share == 0


def test_the_noise_has_the_declared_scale_is_symmetric_and_its_spectrum_is_below_the_floor():
    n, sigma, clip = 120, 1.5, 0.4
    released = privatise({"a": torch.zeros(n, n)}, sigma, clip, SeededNoise(np.random.default_rng(0)))["a"]
    assert torch.equal(released, released.mT)
    upper = released[torch.triu(torch.ones(n, n, dtype=torch.bool))]
    assert float(upper.std()) == pytest.approx(sigma * clip, rel=0.03)
    top = float(torch.linalg.eigvalsh(released)[-1])
    assert 0.9 * noise_floor(n, sigma, clip) < top < 1.1 * noise_floor(n, sigma, clip)


@pytest.mark.parametrize("clients", [1, 4, 25])
def test_the_floor_is_that_of_the_noises_of_all_clients_together(clients: int):
    n, sigma, clip = 100, 1.5, 0.4
    noise = SeededNoise(np.random.default_rng(clients))
    total = sum(privatise({"a": torch.zeros(n, n)}, sigma, clip, noise)["a"] for _ in range(clients))
    top = float(torch.linalg.eigvalsh(total)[-1])
    assert 0.85 * noise_floor(n, sigma, clip, clients) < top < noise_floor(n, sigma, clip, clients)


@pytest.mark.parametrize(("sigma", "clip"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_no_release_without_noise(sigma, clip):
    with pytest.raises(ValueError, match="must be"):
        privatise({"a": torch.eye(2)}, sigma, clip, SeededNoise(np.random.default_rng(0)))
