"""The guarantee: one example moves the sum by at most C, whatever its gradient holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.privacy.clipping import clip_factors, clipped_sum


def gradients(n: int, scale: float, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "b": (torch.randn(n, 6, 3, generator=g) * scale).to(dtype),
        "head": (torch.randn(n, 4, generator=g) * scale).to(dtype),
    }


def joint_norm(total: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in total.values()]).norm())


@settings(max_examples=80, deadline=None)
@given(
    st.floats(1e-12, 1e12), st.floats(1e-3, 1e3), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 1000)
)
def test_no_clipped_gradient_exceeds_the_clip(scale: float, clip: float, dtype: torch.dtype, seed: int):
    total, norms = clipped_sum(gradients(1, scale, dtype, seed), clip)
    assert joint_norm(total) <= clip
    assert joint_norm(total) >= min(clip, float(norms[0])) * (1 - 1e-5), "and clipping takes no more than it must"


def test_sum_against_a_loop_in_float64():
    drawn = gradients(9, 2.0, torch.float64)
    total, norms = clipped_sum(drawn, 1.5)
    wanted = {name: torch.zeros_like(value[0]) for name, value in drawn.items()}
    for i in range(9):
        norm = torch.cat([value[i].flatten() for value in drawn.values()]).norm()
        assert float(norms[i]) == pytest.approx(float(norm), rel=1e-12)
        for name, value in drawn.items():
            wanted[name] += value[i] * min(1.0, 1.5 / float(norm))
    for name in drawn:
        assert torch.allclose(total[name], wanted[name], rtol=2e-6)


def test_one_joint_norm_not_one_per_tensor():
    drawn = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])}
    total, norms = clipped_sum(drawn, 1.0)
    assert float(norms[0]) == 5.0
    assert (float(total["a"]), float(total["b"])) == pytest.approx((0.6, 0.8), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_example_contributes_nothing_and_harms_no_other(bad: float):
    drawn = gradients(3, 1.0, torch.float32)
    clean, _ = clipped_sum({name: value[[0, 2]] for name, value in drawn.items()}, 1.0)
    drawn["b"][1, 0, 0] = bad
    found, norms = clipped_sum(drawn, 1.0)
    assert not torch.isfinite(norms[1])
    assert all(torch.equal(found[name], clean[name]) for name in drawn)


def test_zero_gradients_and_empty_batches_give_zeros():
    assert float(clip_factors(torch.zeros(1), 1.0)) == 1.0
    total, _ = clipped_sum({"a": torch.zeros(2, 3)}, 1.0)
    assert torch.equal(total["a"], torch.zeros(3, dtype=torch.float64))
    total, norms = clipped_sum({"a": torch.zeros(0, 3)}, 1.0)
    assert torch.equal(total["a"], torch.zeros(3, dtype=torch.float64))
    assert norms.shape == (0,)


def test_replacing_nothing_but_one_example_moves_the_sum_by_at_most_the_clip():
    """Record and replay on neighbours: the sum with and without example i."""
    drawn = gradients(20, 5.0, torch.float32)
    whole, _ = clipped_sum(drawn, 0.7)
    for i in range(20):
        rest = [j for j in range(20) if j != i]
        without, _ = clipped_sum({name: value[rest] for name, value in drawn.items()}, 0.7)
        assert joint_norm({name: whole[name] - without[name] for name in drawn}) <= 0.7 * (1 + 1e-12)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_bad_clips_are_refused(clip: float):
    with pytest.raises(ValueError, match="clip"):
        clipped_sum({"a": torch.zeros(1, 1)}, clip)


def test_disagreeing_gradients_are_refused():
    with pytest.raises(ValueError, match="number of examples"):
        clipped_sum({"a": torch.zeros(1, 1), "b": torch.zeros(2, 1)}, 1.0)
    with pytest.raises(ValueError, match="no gradients"):
        clipped_sum({}, 1.0)
