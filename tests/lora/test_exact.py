"""Sums of low-rank products against dense float64 arithmetic in numpy."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.lora.exact import add_low_rank, compress, mean_of_products, residual_of_mean

SHAPES = [
    (30, 12, 4),
    (12, 30, 4),
    (16, 16, 3),
    (5, 7, 9),
    (7, 5, 9),
    (6, 6, 6),
    (1, 8, 1),
    (8, 1, 3),
]  # m, n, k; some with k > min(m, n)
Pair = tuple[torch.Tensor, torch.Tensor]


def pair(m: int, n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pair:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((m, k), (k, n)))


def dense(B: torch.Tensor, A: torch.Tensor) -> np.ndarray:
    return B.double().numpy() @ A.double().numpy()


def truth(pairs: list[Pair], weights: list[float], scales: list[float] | None = None) -> np.ndarray:
    """Σ p_k s_k B_k·A_k, one m×n matrix at a time."""
    return sum(p * s * dense(*x) for x, p, s in zip(pairs, weights, scales or [1.0] * len(pairs), strict=True))


def lost(pairs: list[Pair], weights: list[float]) -> np.ndarray:
    """What averaging the factors loses: mean of the products minus product of the means."""
    means = [sum(p * x[i].double().numpy() for x, p in zip(pairs, weights, strict=True)) for i in (0, 1)]
    return truth(pairs, weights) - means[0] @ means[1]


def best_error(matrix: np.ndarray, rank: int) -> float:
    """The smallest Frobenius error of any approximation of a rank: the root of the sum of the squared remaining
    singular values.
    """
    values = np.linalg.svd(matrix, compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum()))


def close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-12, size: float | None = None) -> bool:
    return bool(np.linalg.norm(found - wanted) <= tolerance * (np.linalg.norm(wanted) if size is None else size))


# mean_of_products


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("scales", [None, [2.0, 0.5, -1.0]])
def test_the_mean_of_products_is_exact_for_unequal_ranks_weights_and_scales(
    m: int, n: int, k: int, scales: list[float] | None
):
    pairs = [pair(m, n, k + i, seed=i) for i in range(3)]
    weights = [0.7, 0.05, 0.25]
    B, A = mean_of_products(pairs, weights, scales)
    assert (B.shape, A.shape) == ((m, 3 * k + 3), (3 * k + 3, n))
    assert B.dtype == A.dtype == torch.float64
    assert close(dense(B, A), truth(pairs, weights, scales))


def test_a_product_without_columns_adds_nothing():
    full, empty = pair(6, 5, 2), pair(6, 5, 0)
    B, A = mean_of_products([empty, full, empty], [0.2, 0.5, 0.3])
    assert (B.shape[1], A.shape[0]) == (2, 2)
    assert close(dense(B, A), 0.5 * dense(*full))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_mean_is_taken_in_float64_whatever_comes_in(dtype: torch.dtype):
    pairs = [pair(9, 7, 2, seed, dtype) for seed in range(4)]
    assert close(dense(*mean_of_products(pairs, [0.1, 0.2, 0.3, 0.4])), truth(pairs, [0.1, 0.2, 0.3, 0.4]), 1e-14)


# residual_of_mean


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 10**6),
    st.sampled_from([1e-30, 1.0, 1e20]),
)
def test_means_and_residual_together_are_the_mean_of_the_products(
    m: int, n: int, r: int, clients: int, seed: int, scale: float
):
    pairs = [(scale * B, scale * A) for B, A in (pair(m, n, r, seed + i) for i in range(clients))]
    raw = np.random.default_rng(seed).uniform(0.01, 1, clients)
    weights = [float(x) for x in raw / raw.sum()]
    B, A = residual_of_mean(pairs, weights)
    assert B.shape[1] == A.shape[0] <= min(m, n, clients * r)
    size = sum(p * float(b.norm() * a.norm()) for (b, a), p in zip(pairs, weights, strict=True))
    assert close(dense(B, A), lost(pairs, weights), 1e-12, size)


def test_the_residual_has_the_rank_it_must_have_and_no_more():
    """K centred factors of rank r span (K − 1)·r directions."""
    pairs = [pair(40, 50, 3, seed) for seed in range(4)]
    B, A = residual_of_mean(pairs, [0.4, 0.3, 0.2, 0.1])
    assert B.shape[1] == 9
    assert np.linalg.matrix_rank(lost(pairs, [0.4, 0.3, 0.2, 0.1])) == 9
    assert close(dense(B, A), lost(pairs, [0.4, 0.3, 0.2, 0.1]))
    assert np.allclose(A @ A.T, np.eye(9), atol=1e-13)


@pytest.mark.parametrize("clients", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("same", ["both", "A", "B"])
def test_where_averaging_loses_nothing_the_residual_has_no_columns(clients: int, same: str):
    """Weights like 1/7 leave rounding in B_k − B̄,
    which must not become directions that are then sent to every client.
    """
    B, A = pair(20, 15, 4, dtype=torch.float32)
    own = [pair(20, 15, 4, seed + 1, torch.float32) for seed in range(clients)]
    pairs = [(B if same in ("both", "B") else b, A if same in ("both", "A") else a) for b, a in own]
    found = residual_of_mean(pairs, [1 / clients] * clients)
    assert (found[0].shape, found[1].shape) == ((20, 0), (0, 15))


def test_a_small_true_residual_is_kept():
    """Clients that differ in the last bits of float32 do lose something, and it is found."""
    B, A = pair(20, 15, 4)
    step = [pair(20, 15, 4, seed) for seed in (1, 2)]
    pairs = [(B + 1e-6 * b, A + 1e-6 * a) for b, a in step]
    found = residual_of_mean(pairs, [0.25, 0.75])
    assert found[0].shape[1] == 4
    wanted = 0.25 * 0.75 * 1e-12 * (step[0][0] - step[1][0]).numpy() @ (step[0][1] - step[1][1]).numpy()
    assert close(dense(*found), wanted, 1e-6)


@pytest.mark.parametrize(("weights", "total"), [([0.5, 0.4], "0.9"), ([1.0, 1.0], "2.0"), ([0.0, 0.0], "0.0")])
def test_weights_of_a_residual_sum_to_one(weights: list[float], total: str):
    with pytest.raises(ValueError, match=f"weights must sum to 1, got {total}"):
        residual_of_mean([pair(5, 4, 2), pair(5, 4, 2, 1)], weights)


def test_unequal_ranks_have_no_mean():
    with pytest.raises(ValueError, match=r"ranks \[2, 3\] differ"):
        residual_of_mean([pair(5, 4, 2), pair(5, 4, 3)], [0.5, 0.5])


# add_low_rank


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10),
    st.integers(1, 10),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, 10**6),
    st.sampled_from([1e-30, 1.0, 1e20]),
)
def test_sums_are_exact_and_capped_sums_are_best(m: int, n: int, k: int, j: int, seed: int, scale: float):
    first, second = pair(m, n, k, seed), pair(m, n, j, seed + 1)
    first, second = (first[0] * scale, first[1]), (second[0] * scale, second[1])
    wanted = dense(*first) + dense(*second)
    size = float(np.linalg.norm(wanted))
    found = add_low_rank(first, second)
    assert found[0].shape[1] <= min(m, n, k + j)
    assert close(dense(*found), wanted, 1e-11, size)
    for rank in range(min(m, n) + 1):
        capped = add_low_rank(first, second, rank)
        assert capped[0].shape[1] <= rank
        assert abs(np.linalg.norm(dense(*capped) - wanted) - best_error(wanted, rank)) <= 1e-11 * size


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_product_and_its_negative_cancel_to_no_direction_at_all(m: int, n: int, k: int):
    B, A = pair(m, n, k)
    found = add_low_rank((B, A), (-B / 3, 3 * A))
    assert (found[0].shape, found[1].shape) == ((m, 0), (0, n))


def test_what_cancels_does_not_hide_what_remains():
    B, A = pair(30, 20, 4)
    small = pair(30, 20, 2, 1)
    found = add_low_rank(mean_of_products([(B, A), small], [1.0, 1e-9]), (-B / 3, 3 * A))
    assert found[0].shape[1] == 2
    assert close(dense(*found), 1e-9 * dense(*small), 1e-5)


# compress


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("scale", [1e-110, 1e-30, 1.0, 1e20, 1e100])
def test_compress_is_the_svd_and_says_what_it_dropped(m: int, n: int, k: int, scale: float):
    B, A = pair(m, n, k)
    wanted = dense(B, A)
    values = np.linalg.svd(wanted, compute_uv=False)
    for rank in [None, *range(min(m, n) + 2)]:
        B2, A2, dropped = compress(scale * B, scale * A, rank)
        kept = min(k, m, n) if rank is None else min(k, m, n, rank)
        assert (B2.shape, A2.shape) == ((m, kept), (kept, n))
        assert torch.allclose(A2 @ A2.mT, torch.eye(kept, dtype=torch.float64), atol=1e-13)
        B2, dropped = B2 / scale / scale, dropped / scale / scale
        assert np.allclose(B2.norm(dim=0), values[:kept], rtol=1e-11)
        gram = (B2.mT @ B2).numpy()
        assert np.abs(gram - np.diag(np.diag(gram))).max(initial=0) < 1e-12 * values[0] ** 2
        error = best_error(wanted, kept)
        assert abs(np.linalg.norm(dense(B2, A2) - wanted) - error) < 1e-12 * values[0] * 10
        assert abs(dropped - error) < 1e-12 * values[0]
        assert (dropped == 0) == (kept == min(k, m, n))


@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("rank", [None, 0, 2])
def test_nothing_compresses_to_nothing(k: int, rank: int | None):
    B2, A2, dropped = compress(torch.zeros(6, k), torch.ones(k, 4), rank)
    assert (B2.shape, A2.shape, dropped) == ((6, 0), (0, 4), 0.0)


@pytest.mark.parametrize("true_rank", [1, 2, 3])
def test_rank_deficient_factors_compress_to_their_rank(true_rank: int):
    B, C = pair(15, 8, true_rank)
    A = pair(8, 12, 8, 3)[1]
    B2, A2, dropped = compress(B @ C, A)  # k = 8 columns of a lower rank
    assert B2.shape[1] == true_rank
    assert dropped == 0
    assert close(dense(B2, A2), dense(B @ C, A))


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 5])
def test_equal_singular_values_at_the_cut(rank: int):
    """Any choice among equals is best; what is dropped is the same for all of them."""
    B, A = torch.linalg.qr(pair(9, 9, 5)[0])[0], torch.linalg.qr(pair(7, 7, 5)[0])[0].mT
    B2, A2, dropped = compress(3.0 * B, A, rank)
    assert B2.shape[1] == rank
    assert dropped == pytest.approx(3 * math.sqrt(5 - rank), rel=1e-12)
    assert np.linalg.norm(dense(B2, A2) - dense(3.0 * B, A)) == pytest.approx(dropped, rel=1e-12, abs=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 10),
    st.integers(1, 10),
    st.integers(1, 8),
    st.integers(0, 10**6),
    st.floats(0, 0.99),
    st.integers(0, 8),
)
def test_a_tolerance_is_kept_to_and_used_up(m: int, n: int, k: int, seed: int, tolerance: float, cap: int):
    B, A = pair(m, n, k, seed)
    B = B * torch.logspace(0, -6, k, dtype=torch.float64)
    wanted = dense(B, A)
    size = float(np.linalg.norm(wanted))
    B2, A2, dropped = compress(B, A, tolerance=tolerance)
    error = float(np.linalg.norm(dense(B2, A2) - wanted))
    assert error <= (tolerance + 1e-12) * size
    assert abs(dropped - error) <= 1e-12 * size
    kept = B2.shape[1]
    if kept:
        assert best_error(wanted, kept - 1) > (tolerance - 1e-12) * size, "one direction fewer would have been too few"
    assert compress(B, A, rank=cap, tolerance=tolerance)[0].shape[1] == min(cap, kept)


def test_the_worst_that_a_tolerance_may_cut_leaves_a_direction():
    B2, _, _ = compress(*pair(6, 5, 3), tolerance=0.999999)
    assert B2.shape[1] == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(2, 10), st.integers(1, 4), st.integers(0, 10**6), st.integers(1, 3))
def test_no_perturbed_approximation_is_better(m: int, n: int, k: int, seed: int, rank: int):
    B, A = pair(m, n, k, seed)
    wanted = dense(B, A)
    B2, A2, _ = compress(B, A, rank)
    error = np.linalg.norm(dense(B2, A2) - wanted)
    draws = np.random.default_rng(seed)
    for step in (1e-4, 1e-2, 1.0):
        other = (B2.numpy() + step * draws.normal(size=B2.shape)) @ (A2.numpy() + step * draws.normal(size=A2.shape))
        assert np.linalg.norm(other - wanted) >= error - 1e-10


def test_inputs_stay_as_they_were():
    B, A = pair(8, 6, 3)
    copies = B.clone(), A.clone()
    compress(B, A, 2)
    mean_of_products([(B, A)], [0.5])
    residual_of_mean([(B, A), (2 * B, A)], [0.5, 0.5])
    assert torch.equal(B, copies[0])
    assert torch.equal(A, copies[1])


# refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(
    "function", [lambda x: compress(*x), lambda x: mean_of_products([x], [1.0]), lambda x: residual_of_mean([x], [1.0])]
)
def test_non_finite_entries_are_refused(function, where: int, bad: float):
    x = pair(5, 4, 2)
    x[where][1, 1] = bad
    with pytest.raises(ValueError, match="a factor holds NaN or infinite entries; exclude the update"):
        function(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_and_scales_are_refused(bad: float):
    x = pair(5, 4, 2)
    with pytest.raises(ValueError, match=f"weights and scales must be finite, got {bad}"):
        mean_of_products([x, x], [0.5, bad])
    with pytest.raises(ValueError, match=f"weights and scales must be finite, got {bad}"):
        mean_of_products([x, x], [0.5, 0.5], [bad, 1.0])
    with pytest.raises(ValueError, match=f"weights and scales must be finite, got {bad}"):
        residual_of_mean([x, x], [0.5, bad])


@pytest.mark.parametrize(
    ("B", "A"),
    [
        ((5, 2), (3, 4)),
        ((5, 2), (2,)),
        ((5,), (5, 4)),
        ((), (2, 4)),
        ((5, 2), ()),
        ((1, 5, 2), (2, 4)),
        ((5, 2), (1, 2, 4)),
    ],
)
def test_shapes_that_do_not_multiply_are_refused(B: tuple[int, ...], A: tuple[int, ...]):
    with pytest.raises(ValueError, match="do not multiply to"):
        compress(torch.zeros(B), torch.zeros(A))


def test_products_of_different_shapes_are_refused():
    for other in (pair(6, 4, 2), pair(5, 3, 2)):
        with pytest.raises(ValueError, match="do not multiply to 5×4"):
            mean_of_products([pair(5, 4, 2), other], [0.5, 0.5])
        with pytest.raises(ValueError, match="do not multiply to 5×4"):
            add_low_rank(pair(5, 4, 2), other)


def test_counts_are_checked():
    x = pair(5, 4, 2)
    with pytest.raises(ValueError, match="at least one; got 0 products, 0 weights"):
        mean_of_products([], [])
    with pytest.raises(ValueError, match="got 2 products, 1 weights"):
        residual_of_mean([x, x], [1.0])
    with pytest.raises(ValueError, match="got 1 products, 1 weights, 2 scales"):
        mean_of_products([x], [1.0], [1.0, 1.0])


def test_ranks_and_tolerances_out_of_range_are_refused():
    x = pair(5, 4, 2)
    with pytest.raises(ValueError, match="rank must be >= 0, got -1"):
        compress(*x, rank=-1)
    for tolerance in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"tolerance must be in \[0, 1\), got"):
            compress(*x, tolerance=tolerance)


MEMORY = """
import resource, torch
from fedlab.lora.exact import add_low_rank, compress, mean_of_products, residual_of_mean
from fedlab.lora.ranks import frobenius_norm, truncate
torch.set_num_threads(1)
pairs = [(torch.randn(200_000, 4), torch.randn(4, 200_000)) for _ in range(3)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
B, A = residual_of_mean(pairs, [0.5, 0.25, 0.25])
assert B.shape == (200_000, 8), B.shape
compress(*mean_of_products(pairs, [0.5, 0.25, 0.25]), 4)
add_low_rank(*pairs[:2])
truncate(*pairs[0], 4)
assert frobenius_norm(*pairs[0]) > 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_m_by_n_matrix_is_never_formed():
    """m = n = 200 000: the product alone would be 320 GB.

    Peak memory is read in a process of its own, so that no other test sets it.
    """
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 600, "MB; three pairs are 19 MB, and 154 MB in float64 at rank 12 with their QR"
