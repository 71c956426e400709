"""``refactorize`` keeps the product, makes A orthonormal, and does so for every shape, rank and dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.lora.svd import orthonormal_rows, refactorize, refactorize_state, rotation

SHAPES = [(48, 32, 4), (32, 48, 4), (8, 40, 8), (40, 8, 8), (16, 16, 1), (5, 7, 3)]


def factors(m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float32, product_rank: int | None = None):
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=g, dtype=torch.float64)
    if product_rank is not None:
        B = (
            B[:, :product_rank] @ torch.randn(product_rank, r, generator=g, dtype=torch.float64)
            if product_rank
            else B * 0
        )
    return B.to(dtype), torch.randn(r, n, generator=g, dtype=torch.float64).to(dtype)


def assert_orthonormal(A: torch.Tensor, tolerance: float = 1e-6):
    gram = A.double() @ A.double().mT
    assert (gram - torch.eye(A.shape[-2], dtype=torch.float64)).abs().max() < tolerance


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_product_orthonormality_and_singular_values_against_the_dense_svd(m: int, n: int, r: int):
    B, A = factors(m, n, r)
    B2, A2 = refactorize(B, A)
    dense = B.double() @ A.double()
    assert B2.dtype == A2.dtype == torch.float32
    assert (B2.shape, A2.shape) == (B.shape, A.shape)
    assert relative(B2.double() @ A2.double(), dense) < 1e-6
    assert_orthonormal(A2)
    values = torch.linalg.svdvals(dense)[:r]
    assert torch.allclose(B2.double().norm(dim=0), values, rtol=1e-5)
    gram = B2.double().mT @ B2.double()
    assert (gram - torch.diag(torch.diagonal(gram))).abs().max() < 1e-5 * values[0] ** 2


@pytest.mark.parametrize("product_rank", [0, 1, 2])
@pytest.mark.parametrize(("m", "n", "r"), SHAPES[:4])
def test_rank_deficient_products_still_give_orthonormal_rows_inside_the_old_row_space(
    m: int, n: int, r: int, product_rank: int
):
    B, A = factors(m, n, r, product_rank=product_rank)
    B2, A2 = refactorize(B, A)
    assert_orthonormal(A2)
    assert (B2.double() @ A2.double() - B.double() @ A.double()).norm() <= 1e-6 * max(
        1.0, float((B.double() @ A.double()).norm())
    )
    basis = torch.linalg.qr(A.double().mT)[0]  # [n, r]
    assert (A2.double() - A2.double() @ basis @ basis.mT).abs().max() < 1e-6


def test_a_rank_deficient_a_still_gives_orthonormal_rows():
    B, A = factors(20, 12, 4)
    A[2] = A[1]
    A[3] = 0
    B2, A2 = refactorize(B, A)
    assert_orthonormal(A2)
    assert relative(B2.double() @ A2.double(), B.double() @ A.double()) < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_the_identities_hold_for_any_shape_and_scale(m: int, n: int, r: int, seed: int, scale: float):
    r = min(r, m, n)
    B, A = factors(m, n, r, seed)
    B = B * scale
    B2, A2 = refactorize(B, A)
    assert relative(B2.double() @ A2.double(), B.double() @ A.double()) < 1e-6
    assert_orthonormal(A2)
    norms = B2.double().norm(dim=0)
    assert bool((norms[:-1] >= norms[1:] * (1 - 1e-5)).all())
    largest = A2.gather(-1, A2.abs().argmax(-1, keepdim=True))
    assert bool((largest > 0).all())


def test_deterministic_and_stable_under_a_second_application():
    B, A = factors(30, 20, 5)
    once, again = refactorize(B, A), refactorize(B, A)
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    B3, A3 = refactorize(*once)
    assert relative(B3, once[0]) < 1e-5
    assert relative(A3, once[1]) < 1e-5


def test_batched_equals_one_by_one():
    pairs = [factors(18, 14, 3, seed) for seed in range(4)]
    B2, A2 = refactorize(torch.stack([b for b, _ in pairs]), torch.stack([a for _, a in pairs]))
    for i, (B, A) in enumerate(pairs):
        b, a = refactorize(B, A)
        assert torch.allclose(B2[i], b, atol=1e-6)
        assert torch.allclose(A2[i], a, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_input_is_computed_in_float32(dtype: torch.dtype):
    B, A = factors(24, 16, 4, dtype=dtype)
    B2, A2 = refactorize(B, A)
    assert B2.dtype == A2.dtype == torch.float32
    assert relative(B2.double() @ A2.double(), B.double() @ A.double()) < 1e-6


def test_float64_stays_float64():
    B, A = factors(24, 16, 4, dtype=torch.float64)
    B2, A2 = refactorize(B, A)
    assert relative(B2 @ A2, B @ A) < 1e-14


def test_truncation_is_the_best_approximation_and_padding_keeps_the_product():
    B, A = factors(20, 15, 5, dtype=torch.float64)
    U, S, Vt = torch.linalg.svd(B @ A)
    B2, A2 = refactorize(B, A, rank=2)
    assert relative(B2 @ A2, U[:, :2] * S[:2] @ Vt[:2]) < 1e-12
    B3, A3 = refactorize(B, A, rank=8)
    assert (B3.shape, A3.shape) == ((20, 8), (8, 15))
    assert relative(B3 @ A3, B @ A) < 1e-12
    assert_orthonormal(A3, 1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_non_finite_input_is_refused_by_name(bad: float, where: int):
    pair = list(factors(8, 6, 2))
    pair[where][0, 0] = bad
    with pytest.raises(ValueError, match=("B", "A")[where] + " holds NaN or infinite"):
        refactorize(*pair)


@pytest.mark.parametrize(("m", "n", "r", "rank"), [(3, 9, 4, None), (9, 3, 4, None), (9, 9, 4, 10), (9, 9, 4, 0)])
def test_impossible_ranks_are_refused(m: int, n: int, r: int, rank: int | None):
    with pytest.raises(ValueError, match="rank"):
        refactorize(torch.zeros(m, r), torch.zeros(r, n), rank)


def test_shapes_that_do_not_multiply_are_refused():
    with pytest.raises(ValueError, match="do not multiply"):
        refactorize(torch.zeros(4, 2), torch.zeros(3, 4))


def test_the_m_by_n_product_is_never_formed():
    """A product of this shape would need 3.2 TB."""
    B2, A2 = refactorize(torch.randn(900_000, 2), torch.randn(2, 900_000))
    assert_orthonormal(A2)
    assert B2.shape == (900_000, 2)


def test_orthonormal_rows_spans_the_same_rows_with_a_positive_triangle():
    _, A = factors(4, 30, 6, dtype=torch.float64)
    Q = orthonormal_rows(A)
    assert_orthonormal(Q, 1e-12)
    triangle = A @ Q.mT  # lower triangular: A = R^T Q
    assert torch.allclose(triangle, torch.tril(triangle), atol=1e-12)
    assert bool((torch.diagonal(triangle) > 0).all())
    with pytest.raises(ValueError, match="cannot be orthonormal"):
        orthonormal_rows(torch.zeros(5, 3))


def test_rotation_carries_b_space_state():
    B, A = factors(10, 12, 4, dtype=torch.float64)
    A = orthonormal_rows(A)
    B2, A2 = refactorize(B, A)
    assert relative(B @ rotation(A2, A).mT, B2) < 1e-12


def test_refactorize_state_touches_pairs_only_and_batches_by_shape():
    state = {"head.w": torch.ones(2)}
    for i, (m, n) in enumerate([(8, 6), (8, 6), (5, 9)]):
        state[f"layer{i}.lora_B"], state[f"layer{i}.lora_A"] = factors(m, n, 3, seed=i)
    found = refactorize_state(state)
    assert found.keys() == state.keys()
    assert found["head.w"] is state["head.w"]
    for i in range(3):
        before = state[f"layer{i}.lora_B"].double() @ state[f"layer{i}.lora_A"].double()
        assert relative(found[f"layer{i}.lora_B"].double() @ found[f"layer{i}.lora_A"].double(), before) < 1e-6
        assert_orthonormal(found[f"layer{i}.lora_A"])
