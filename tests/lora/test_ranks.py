"""Truncation, padding and Frobenius norms against dense float64 arithmetic in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.lora.ranks import frobenius_norm, narrow, pad, truncate, widen

SHAPES = [(30, 12, 4), (12, 30, 4), (16, 16, 3), (5, 7, 9), (7, 5, 9), (1, 8, 1), (8, 1, 3)]


def pair(m: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=g, dtype=torch.float64), torch.randn(k, n, generator=g, dtype=torch.float64)


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vt = np.linalg.svd(matrix)
    return U[:, :rank] @ np.diag(S[:rank]) @ Vt[:rank]


def relative(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("split", ["sqrt", "left"])
@pytest.mark.parametrize("scale", [1e-110, 1e-30, 1.0, 1e20, 1e100])
def test_truncation_is_the_dense_one_at_every_rank(m: int, n: int, k: int, split: str, scale: float):
    B, A = pair(m, n, k)
    wanted = B.numpy() @ A.numpy()
    values = np.linalg.svd(wanted, compute_uv=False)
    for rank in range(1, min(m, n) + 1):
        B2, A2 = truncate(scale * B, scale * A, rank, split)
        assert (B2.shape, A2.shape) == ((m, rank), (rank, n))
        assert B2.dtype == A2.dtype == torch.float64
        assert relative((B2 / scale) @ (A2 / scale), best(wanted, rank)) < 1e-11
        left, right = B2.norm(dim=0) / scale, A2.norm(dim=1) / scale
        kept = min(rank, k)
        if split == "left":
            assert np.allclose((A2[:kept] @ A2[:kept].mT).numpy(), np.eye(kept), atol=1e-13)
            B2 = B2 / scale / scale
            assert np.allclose([float(b.norm()) for b in B2.mT][:kept], values[:kept], rtol=1e-11)
        else:
            assert np.allclose(left[:kept], np.sqrt(values[:kept]), rtol=1e-11)
            assert np.allclose(right[:kept], np.sqrt(values[:kept]), rtol=1e-11)
        assert not B2[:, kept:].any()
        assert not A2[kept:].any()


@pytest.mark.parametrize("split", ["sqrt", "left"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_zero_product_truncates_to_zero_factors(split: str, k: int):
    B2, A2 = truncate(torch.zeros(6, k), torch.ones(k, 5), 2, split)
    assert (B2.shape, A2.shape) == ((6, 2), (2, 5))
    assert not B2.any()
    assert not A2.any()


@pytest.mark.parametrize("split", ["sqrt", "left"])
def test_missing_directions_are_zero_and_equal_singular_values_keep_their_norm(split: str):
    B, A = torch.linalg.qr(pair(9, 1, 3)[0])[0], torch.linalg.qr(pair(7, 1, 3)[0])[0].mT
    B2, A2 = truncate(2 * B, A, 5, split)
    assert relative(B2 @ A2, 2 * B.numpy() @ A.numpy()) < 1e-13
    assert not B2[:, 3:].any()
    assert not A2[3:].any()
    B2, A2 = truncate(2 * B, A, 2, split)
    assert float((B2 @ A2).norm()) == pytest.approx(2 * math.sqrt(2), rel=1e-12)
    assert float((B2 @ A2 - 2 * B @ A).norm()) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize("rank", [-1, 0, 6])
def test_impossible_ranks_are_refused(rank: int):
    with pytest.raises(ValueError, match=rf"rank = {rank} must be in \[1, min\(m, n\)\] = \[1, 5\]"):
        truncate(*pair(8, 5, 2), rank)


def test_other_bad_arguments_of_truncate_are_refused():
    with pytest.raises(ValueError, match="split must be one of sqrt, left, got 'right'"):
        truncate(*pair(8, 5, 2), 2, "right")
    with pytest.raises(ValueError, match="do not multiply"):
        truncate(torch.zeros(4, 2), torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="do not multiply"):
        truncate(torch.zeros(4, 2), torch.zeros(2), 1)
    B, A = pair(8, 5, 2)
    for bad in (math.nan, math.inf):
        A[0, 0] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            truncate(B, A, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 4), st.integers(0, 5))
def test_padding_keeps_the_factors_and_adds_zeros(m: int, n: int, k: int, more: int):
    B, A = pair(m, n, k)
    B2, A2 = pad(B, A, k + more)
    assert (B2.shape, A2.shape) == ((m, k + more), (k + more, n))
    assert torch.equal(B2[:, :k], B)
    assert torch.equal(A2[:k], A)
    assert not B2[:, k:].any()
    assert not A2[k:].any()


def test_padding_to_less_and_of_unequal_factors_is_refused():
    with pytest.raises(ValueError, match="rank = 1 is below the 2 that the factors have; truncate them"):
        pad(*pair(4, 3, 2), 1)
    with pytest.raises(ValueError, match="do not multiply"):
        pad(torch.zeros(4, 2), torch.zeros(3, 5), 4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_change_of_the_first_directions_is_one_of_the_first_directions_when_it_is_widened(rank: int):
    B, A = pair(5, 7, 4)
    state = {"q.lora_B": B, "q.lora_A": A, "head.w": torch.ones(3)}
    wide = widen(narrow(state, rank), state)
    assert {name: value.shape for name, value in wide.items()} == {name: value.shape for name, value in state.items()}
    assert torch.equal(wide["q.lora_B"], torch.cat([B[:, :rank], torch.zeros(5, 4 - rank)], 1))
    assert torch.equal(wide["q.lora_A"], torch.cat([A[:rank], torch.zeros(4 - rank, 7)]))
    assert torch.equal(wide["head.w"], state["head.w"])


@pytest.mark.parametrize("split", ["sqrt", "left"])
def test_each_client_gets_the_best_at_its_own_rank(split: str):
    B, A = pair(12, 9, 6)
    wanted = B.numpy() @ A.numpy()
    ranks = {"client-2": 1, "client-0": 9, "client-1": 4}
    kept = dict(
        zip(("q.lora_B", "q.lora_A"), truncate(B, A, 9, split), strict=True)
    )  # FlexLoRA's state: sorted directions
    found = {client: narrow(kept, rank) for client, rank in ranks.items()}
    for client, own in found.items():
        B2, A2 = own["q.lora_B"], own["q.lora_A"]
        assert (B2.shape, A2.shape) == ((12, ranks[client]), (ranks[client], 9))
        assert relative(B2 @ A2, best(wanted, ranks[client])) < 1e-12
    with pytest.raises(ValueError, match="rank = 10 must be in"):
        truncate(B, A, 10, split)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10),
    st.integers(1, 10),
    st.integers(0, 12),
    st.integers(0, 10**6),
    st.sampled_from([1e-30, 1.0, 1e20]),
)
def test_the_norm_is_the_dense_one(m: int, n: int, k: int, seed: int, scale: float):
    B, A = pair(m, n, k, seed)
    wanted = float(np.linalg.norm(B.numpy() @ A.numpy()))
    assert frobenius_norm(scale * B, scale * A) / scale**2 == pytest.approx(wanted, rel=1e-11)


def test_the_norm_of_what_cancels_is_zero_and_of_nearly_that_is_right():
    """The root of an inner product would be off by the square root of the rounding: 1e-8 instead of 1e-16."""
    B, A = pair(20, 15, 4)
    twice = torch.cat([B, -B / 3], 1), torch.cat([A, 3 * A])
    assert frobenius_norm(*twice) == 0
    small = pair(20, 15, 1, 1)
    nearly = torch.cat([twice[0], 1e-10 * small[0]], 1), torch.cat([twice[1], small[1]])
    assert frobenius_norm(*nearly) == pytest.approx(1e-10 * float((small[0] @ small[1]).norm()), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_norms_of_non_finite_products_are_refused_and_not_zero(bad: float):
    B, A = pair(4, 3, 2)
    B[1, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        frobenius_norm(B, A)


def test_norms_of_factors_that_do_not_multiply_are_refused_and_not_broadcast():
    with pytest.raises(ValueError, match="do not multiply"):
        frobenius_norm(torch.ones(4, 3), torch.ones(1, 5))
