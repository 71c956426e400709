"""Server optimisers against the published update rules, written out in numpy, and against FedSVD's change of basis."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlab.lora.server_optimizer import Moments, ServerOptimizer, rotate_moments, server_step
from fedlab.lora.svd import orthonormal_rows, refactorize

RULES = ("momentum", "adam", "yogi")


def reference(kind: str, deltas: list[np.ndarray], lr: float, b1: float, b2: float, tau: float) -> list[np.ndarray]:
    """Algorithm 2 of arXiv 2003.00295 and FedAvgM of arXiv 1909.06335, one scalar at a time."""
    m, v, out = np.zeros_like(deltas[0]), np.full_like(deltas[0], tau**2), []
    for delta in deltas:
        step = np.empty_like(delta)
        for i in np.ndindex(*delta.shape):
            if kind == "momentum":
                m[i] = b1 * m[i] + delta[i]
                step[i] = lr * m[i]
                continue
            m[i] = b1 * m[i] + (1 - b1) * delta[i]
            if kind == "adam":
                v[i] = b2 * v[i] + (1 - b2) * delta[i] ** 2
            else:
                v[i] -= (1 - b2) * delta[i] ** 2 * math.copysign(1.0, v[i] - delta[i] ** 2) * (v[i] != delta[i] ** 2)
            step[i] = lr * m[i] / (math.sqrt(v[i]) + tau)
        out.append(step)
    return out


@pytest.mark.parametrize("kind", RULES)
def test_equal_to_the_published_rules(kind: str):
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(3, 4)) * 10.0 ** rng.integers(-6, 2) for _ in range(6)]
    options, moments = ServerOptimizer(optimizer=kind, lr=0.3, beta1=0.8, beta2=0.95, tau=1e-2), Moments()
    for delta, wanted in zip(deltas, reference(kind, deltas, 0.3, 0.8, 0.95, 1e-2), strict=True):
        change, moments = server_step(options, {"x.lora_B": torch.tensor(delta)}, moments)
        assert np.allclose(change["x.lora_B"].numpy(), wanted, rtol=1e-12, atol=0)


def test_no_momentum_and_rate_one_is_the_mean_itself():
    mean = {"x.lora_B": torch.randn(3, 4), "head.w": torch.randn(2)}
    change, _ = server_step(ServerOptimizer(optimizer="momentum", beta1=0.0), mean, Moments())
    assert all(torch.equal(change[n], mean[n]) for n in mean)


@pytest.mark.parametrize("kind", RULES)
def test_moments_of_what_was_not_averaged_stay_and_nothing_is_edited_in_place(kind: str):
    options = ServerOptimizer(optimizer=kind)
    _, before = server_step(options, {"a.lora_A": torch.ones(2, 2), "a.lora_B": torch.ones(2, 2)}, Moments())
    kept = {n: v.clone() for n, v in before.first.items()}
    _, after = server_step(options, {"a.lora_B": torch.ones(2, 2)}, before)
    assert torch.equal(after.first["a.lora_A"], kept["a.lora_A"])
    assert not torch.equal(after.first["a.lora_B"], kept["a.lora_B"])
    assert all(torch.equal(before.first[n], kept[n]) for n in kept)


def test_a_mean_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"x\.lora_B holds NaN"):
        server_step(ServerOptimizer(optimizer="adam"), {"x.lora_B": torch.tensor([[math.nan]])}, Moments())


def test_rotated_momentum_means_the_same_change_of_weights():
    g = torch.Generator().manual_seed(0)
    A, B, M = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 10), (7, 4), (7, 4)))
    for old in (A, orthonormal_rows(A)):
        B2, A2 = refactorize(B, old)
        before, after = {"x.lora_A": old, "x.lora_B": B}, {"x.lora_A": A2, "x.lora_B": B2}
        rotated = rotate_moments(Moments({"x.lora_B": M}), before, after)
        assert torch.allclose(rotated.first["x.lora_B"] @ A2, M @ old, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="second moments"):
        rotate_moments(Moments({"x.lora_B": M}, {"x.lora_B": M}), before, after)


@pytest.mark.parametrize("kind", RULES)
def test_the_head_has_a_learning_rate_of_its_own(kind: str):
    """It scales the head's step alone, and no moment: these are what they are without."""
    mean = {"x.lora_B": torch.randn(3, 4), "head.weight": torch.randn(2, 3)}
    one = ServerOptimizer(optimizer=kind, lr=0.3)
    own = ServerOptimizer(optimizer=kind, lr=0.3, head_lr=1.5)
    (plain, before), (scaled, after) = (server_step(options, mean, Moments()) for options in (one, own))
    assert torch.equal(plain["x.lora_B"], scaled["x.lora_B"])
    assert torch.allclose(5 * plain["head.weight"], scaled["head.weight"])
    assert all(torch.equal(before.first[name], after.first[name]) for name in mean)
