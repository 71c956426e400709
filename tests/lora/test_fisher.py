"""Weighted truncation against the dense weighted SVD in float64, brute force, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.lora.fisher import row_weights_of, truncate_weighted
from fedlab.lora.ranks import truncate

SHAPES = [(30, 12, 4), (12, 30, 4), (16, 16, 3), (5, 7, 9), (7, 5, 9), (8, 2, 2)]


def problem(m: int, n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    B, A, w = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((m, k), (k, n), (m,)))
    return B, A, (2 * w).exp()  # weights over a few orders of magnitude


def dense_fwsvd(matrix: np.ndarray, weights: np.ndarray, rank: int) -> np.ndarray:
    """Î⁻¹·SVD_r(Î·D), as in the paper; weights > 0."""
    root = np.sqrt(weights)[:, None]
    U, S, Vt = np.linalg.svd(root * matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank] @ Vt[:rank]) / root


def error(found: np.ndarray, matrix: np.ndarray, weights: np.ndarray) -> float:
    return float(np.linalg.norm(np.sqrt(weights)[:, None] * (matrix - found)))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_it_is_the_dense_weighted_svd_at_every_rank(m: int, n: int, k: int, scale: float):
    B, A, w = problem(m, n, k)
    matrix = (B @ A).numpy()
    for rank in range(1, min(m, n) + 1):
        for split in ("sqrt", "left"):
            B2, A2 = truncate_weighted(scale * B, A, rank, scale * w, split)
            assert (B2.shape, A2.shape, B2.dtype, A2.dtype) == ((m, rank), (rank, n), torch.float64, torch.float64)
            wanted = dense_fwsvd(matrix, w.numpy(), rank)
            assert np.linalg.norm((B2 @ A2).numpy() / scale - wanted) < 1e-10 * np.linalg.norm(wanted)


def test_the_split_is_that_of_the_result_itself():
    B, A, w = problem(20, 15, 6)
    values = np.linalg.svd(dense_fwsvd((B @ A).numpy(), w.numpy(), 3), compute_uv=False)[:3]
    B2, A2 = truncate_weighted(B, A, 3, w, "left")
    assert np.allclose((A2 @ A2.mT).numpy(), np.eye(3), atol=1e-12)
    assert np.allclose(B2.norm(dim=0), values)
    B2, A2 = truncate_weighted(B, A, 3, w, "sqrt")
    assert np.allclose(B2.norm(dim=0), np.sqrt(values))
    assert np.allclose(A2.norm(dim=1), np.sqrt(values))


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(2, 10), st.integers(2, 10), st.integers(1, 8)),
    st.integers(0, 10**6),
    st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 7.0, 1e9]), min_size=10, max_size=10),
    st.integers(1, 10),
)
def test_never_worse_than_plain_truncation_nor_than_a_perturbed_result(
    shape: tuple[int, int, int], seed: int, drawn: list[float], rank: int
):
    m, n, k = shape
    rank = min(rank, m, n)
    B, A, _ = problem(m, n, k, seed)
    w = torch.tensor(drawn[:m], dtype=torch.float64)
    matrix, weights = (B @ A).numpy(), w.numpy()
    size = error(np.zeros_like(matrix), matrix, weights)
    B2, A2 = truncate_weighted(B, A, rank, w)
    mine = error((B2 @ A2).numpy(), matrix, weights)
    B3, A3 = truncate(B, A, rank)
    assert mine <= error((B3 @ A3).numpy(), matrix, weights) + 1e-10 * size
    values = np.linalg.svd(np.sqrt(weights)[:, None] * matrix, compute_uv=False)
    assert abs(mine - np.sqrt((values[rank:] ** 2).sum())) <= 1e-7 * size, "the optimum, also where weights are zero"
    draws = np.random.default_rng(seed)
    for step in (1e-4, 1e-2, 1.0):
        other = (B2.numpy() + step * draws.normal(size=B2.shape)) @ (A2.numpy() + step * draws.normal(size=A2.shape))
        assert mine <= error(other, matrix, weights) + 1e-10 * size


def test_weighting_is_worth_something():
    B, A, w = problem(40, 30, 8)
    matrix = (B @ A).numpy()
    plain, weighted = ((x @ y).numpy() for x, y in (truncate(B, A, 3), truncate_weighted(B, A, 3, w)))
    assert error(weighted, matrix, w.numpy()) < 0.9 * error(plain, matrix, w.numpy())
    assert np.linalg.norm(plain - matrix) < 0.99 * np.linalg.norm(weighted - matrix), (
        "and it has its price in the plain norm"
    )


@pytest.mark.parametrize("value", [0.0, 1e-300, 0.3, 1.0, 1e300])
@pytest.mark.parametrize("split", ["sqrt", "left"])
def test_equal_weights_are_plain_truncation_bit_for_bit(value: float, split: str):
    B, A, _ = problem(12, 9, 5)
    found, plain = (
        truncate_weighted(B, A, 3, torch.full((12,), value, dtype=torch.float64), split),
        truncate(B, A, 3, split),
    )
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])


def test_only_ratios_of_weights_count():
    B, A, w = problem(12, 9, 5)
    first, second = truncate_weighted(B, A, 3, w), truncate_weighted(B, A, 3, 2.0**900 * w)
    assert torch.allclose(first[0] @ first[1], second[0] @ second[1], rtol=1e-12, atol=1e-12)


def test_weightless_rows_follow_the_directions_that_the_others_chose():
    B, A, w = problem(10, 12, 6)
    w[3:7] = 0
    B2, A2 = truncate_weighted(B, A, 2, w)
    matrix, rows = (B @ A).numpy(), w.numpy() > 0
    _, _, Vt = np.linalg.svd(np.sqrt(w.numpy())[:, None] * matrix)
    assert np.allclose((B2 @ A2).numpy(), matrix @ Vt[:2].T @ Vt[:2], atol=1e-10)
    assert np.allclose((B2 @ A2).numpy()[rows], dense_fwsvd(matrix[rows], w.numpy()[rows], 2), atol=1e-10)
    tiny = torch.where(w > 0, w, torch.full_like(w, 1e-13))
    B3, A3 = truncate_weighted(B, A, 2, tiny)
    assert torch.allclose(B2 @ A2, B3 @ A3, atol=1e-9), "the limit of vanishing weights"


def test_directions_that_the_weighted_rows_do_not_need_go_to_the_others():
    """Two rows weigh something: two of four directions are theirs, and the other two are the best for what is left."""
    B, A, _ = problem(10, 12, 6)
    w = torch.zeros(10)
    w[[2, 5]] = torch.tensor([1.0, 3.0])
    B2, A2 = truncate_weighted(B, A, 4, w)
    matrix = (B @ A).numpy()
    assert np.allclose((B2 @ A2).numpy()[[2, 5]], matrix[[2, 5]], atol=1e-12), "kept whole"
    V = np.linalg.svd(matrix[[2, 5]])[2][:2]
    left = matrix - matrix @ V.T @ V
    U, S, Vt = np.linalg.svd(left)
    assert np.allclose((B2 @ A2).numpy(), matrix @ V.T @ V + U[:, :2] * S[:2] @ Vt[:2], atol=1e-10)


@pytest.mark.parametrize("k", [0, 3])
def test_the_zero_product_stays_zero(k: int):
    B2, A2 = truncate_weighted(torch.zeros(6, k), torch.ones(k, 5), 2, torch.arange(6.0))
    assert (B2.shape, A2.shape) == ((6, 2), (2, 5))
    assert not B2.any()
    assert not A2.any()


def test_a_product_of_a_smaller_rank_is_kept_whole():
    B, A, w = problem(12, 9, 2)
    w[:8] = 0
    B2, A2 = truncate_weighted(B, A, 5, w)
    assert torch.allclose(B2 @ A2, B @ A, atol=1e-12)
    assert not B2[:, 2:].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_unusable_weights_are_refused(bad: float):
    B, A, w = problem(6, 5, 2)
    w[4] = bad
    with pytest.raises(ValueError, match=f"row_weights must be finite and >= 0, got {bad}"):
        truncate_weighted(B, A, 1, w)


def test_other_bad_arguments_are_refused():
    B, A, w = problem(6, 5, 2)
    with pytest.raises(ValueError, match=r"row_weights have shape \(5,\), want one per row of B, \(6,\)"):
        truncate_weighted(B, A, 1, w[:5])
    with pytest.raises(ValueError, match=r"row_weights have shape \(6, 1\)"):
        truncate_weighted(B, A, 1, w[:, None])
    for rank in (-1, 0, 6):
        with pytest.raises(ValueError, match=rf"rank = {rank} must be in \[1, min\(m, n\)\] = \[1, 5\]"):
            truncate_weighted(B, A, rank, w)
    with pytest.raises(ValueError, match="split must be one of sqrt, left"):
        truncate_weighted(B, A, 1, w, "right")
    with pytest.raises(ValueError, match="do not multiply"):
        truncate_weighted(B, A[:1], 1, w)
    B[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        truncate_weighted(B, A, 1, w)


def test_the_m_by_n_product_is_never_formed():
    """A product of this shape would need 320 GB."""
    g = torch.Generator().manual_seed(0)
    B2, A2 = truncate_weighted(
        torch.randn(200_000, 4, generator=g), torch.randn(4, 200_000, generator=g), 2, torch.rand(200_000, generator=g)
    )
    assert (B2.shape, A2.shape) == ((200_000, 2), (2, 200_000))


def test_row_weights_are_the_weighted_squared_updates_in_client_order():
    g = torch.Generator().manual_seed(0)
    updates = {
        f"client-{i}": {"q.lora_B": torch.randn(6, 3, generator=g), "q.lora_A": torch.randn(3, 4, generator=g)}
        for i in range(12)
    }
    weights = {client: (i + 1) / 78 for i, client in enumerate(updates)}
    found = row_weights_of(updates, weights, "q")
    wanted = np.zeros(6)
    for client, update in updates.items():
        wanted += weights[client] * (update["q.lora_B"].double().numpy() ** 2).sum(1)
    assert found.dtype == torch.float64
    assert np.allclose(found, wanted, rtol=1e-14)
    assert torch.equal(found, row_weights_of(dict(reversed(updates.items())), weights, "q"))
    with pytest.raises(ValueError, match=r"client-0 sent no k\.lora_B"):
        row_weights_of(updates, weights, "k")
    with pytest.raises(ValueError, match="no update"):
        row_weights_of({}, {}, "q")
