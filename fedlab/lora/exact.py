"""Exact sums of low-rank products, as factors. Thin QR and small SVDs only: the m×n matrix is never formed.

A product is a pair (B [m, k], A [k, n]). Everything is computed in float64. FedEx-LoRA (arXiv 2410.09432) and FLoRA
(arXiv 2409.05976) are ``residual_of_mean`` and ``mean_of_products``; their published codes differ from these identities
in orientation or scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
NOTHING = 1e-14  # singular values below this share of the largest are rounding, not rank
EPSILON = 2.0**-50  # and so are those below this share of Σ |b_i|·|a_i|: what float64 leaves of columns that cancel


def mean_of_products(pairs: Sequence[Pair], weights: Sequence[float], scales: Sequence[float] | None = None) -> Pair:
    """Factors of Σ p_k s_k B_k·A_k: the factors side by side, rank Σ r_k, exact. Ranks may differ; s_k are 1 unless
    given.

    Raises ValueError if the counts or the shapes differ, or an entry is not finite.
    """
    check_products(pairs, weights, scales)
    scales = [1.0] * len(pairs) if scales is None else scales
    B = torch.cat([p * s * b.double() for (b, _), p, s in zip(pairs, weights, scales, strict=True)], 1)
    return B, torch.cat([a.double() for _, a in pairs], 0)


def residual_of_mean(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Factors of Σ p_k B_k·A_k − B̄·Ā with B̄ = Σ p_k B_k, Ā = Σ p_k A_k: what averaging the factors loses. Σ p_k = 1.

    Written as Σ p_k (B_k − B̄)·(A_k − Ā), which is the same and cancels nothing large; of full numerical rank, at most
    K·r, and without columns where only rounding is lost. All ranks are equal. Raises ValueError if shapes or ranks
    differ, the weights do not sum to 1, or an entry is not finite.
    """
    check_products(pairs, weights)
    if len({b.shape[1] for b, _ in pairs}) > 1:
        raise ValueError(
            f"ranks {[b.shape[1] for b, _ in pairs]} differ: their factors have no mean; stack them (mean_of_products)"
        )
    if abs(math.fsum(weights) - 1) > 1e-9:
        raise ValueError(f"weights must sum to 1, got {math.fsum(weights)}")
    B = sum((p * b.double() for (b, _), p in zip(pairs, weights, strict=True)), torch.zeros(()).double())
    A = sum((p * a.double() for (_, a), p in zip(pairs, weights, strict=True)), torch.zeros(()).double())
    pairs = [(b.double(), a.double()) for b, a in pairs]
    size = math.fsum(abs(p) * _size(b, a) for (b, a), p in zip(pairs, weights, strict=True))
    U, S, Vt, _ = decompose(*mean_of_products([(b - B, a - A) for b, a in pairs], weights), nothing=EPSILON * size)
    return U * S, Vt


def corrected_b(B: Tensor, A: Tensor, pairs: Sequence[Pair], weights: Sequence[float], ridge: float) -> Tensor:
    """B + ΔB that minimises ‖(B + ΔB)·A − Σ p_k B_k·A_k‖² + λ‖ΔB‖², with λ = ridge · tr(A·Aᵀ)/r. In B's dtype.

    ΔB = [Σ p_k B_k·(A_k·Aᵀ) − B·(A·Aᵀ)]·(A·Aᵀ + λI)⁻¹: r×r systems only. Raises ValueError for shapes that do not fit,
    a ridge that is not positive, or an entry that is not finite; a zero A leaves B as it is.
    """
    check_products([*pairs, (B, A)], [*weights, 1.0])
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge must be > 0 and finite, got {ridge}")
    gram = A.double() @ A.double().mT
    size = float(torch.trace(gram)) / len(A)
    if size == 0:
        return B.clone()
    error = sum(
        (p * b.double() @ (a.double() @ A.double().mT) for (b, a), p in zip(pairs, weights, strict=True)),
        -B.double() @ gram,
    )
    change: Tensor = torch.linalg.solve(gram + ridge * size * torch.eye(len(A), dtype=torch.float64), error, left=False)
    return (B.double() + change).to(B.dtype)


def add_low_rank(first: Pair, second: Pair, rank: int | None = None) -> Pair:
    """Factors of the sum of two products, at their numerical rank; the best approximation of ``rank`` if that is
    smaller.
    """
    return compress(*mean_of_products([first, second], [1.0, 1.0]), rank=rank)[:2]


def compress(B: Tensor, A: Tensor, rank: int | None = None, tolerance: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """The best approximation (Eckart–Young) of B·A at its numerical rank or below.

    Args:
        B: [m, k].
        A: [k, n]; k may be 0, or exceed m and n.
        rank: at most this; default: the numerical rank.
        tolerance: relative Frobenius error that may be cut as well, in [0, 1).

    Returns:
        B2 with the singular values, A2 with orthonormal rows, both float64; and the Frobenius norm of what was cut (0
        if only rounding was).

    Raises:
        ValueError: shapes that do not multiply, rank < 0, a tolerance out of range, or entries that are not finite.
    """
    U, S, Vt, dropped = decompose(B, A, rank, tolerance)
    return U * S, Vt, dropped


def decompose(
    B: Tensor, A: Tensor, rank: int | None = None, tolerance: float = 0.0, nothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(U, S, Vᵀ, dropped) of ``compress``, whose B2 is U·S and whose A2 is Vᵀ.

    Singular values up to ``nothing`` count as rounding too.
    """
    check_products([(B, A)], [1.0])
    if rank is not None and rank < 0:
        raise ValueError(f"rank must be >= 0, got {rank}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    scales = [_power_of_two(B), _power_of_two(A)]  # exact; squares of what remains neither vanish nor overflow
    B, A = B.double() / scales[0], A.double() / scales[1]
    P, R_B = torch.linalg.qr(B)
    Q, R_A = torch.linalg.qr(A.mT)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    largest = float(S[0]) if len(S) else 0.0
    floor = max(NOTHING * largest, EPSILON * _size(B, A), nothing / scales[0] / scales[1])
    significant = int((floor < S).sum())
    tails = S.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[i]: norm of S[i:]
    kept = significant
    if tolerance and kept:
        kept = min(kept, int((tails > tolerance * tails[0]).sum()))
    kept = kept if rank is None else min(kept, rank)
    dropped = float(tails[kept]) * scales[0] * scales[1] if kept < significant else 0.0
    return P @ U[:, :kept], S[:kept] * scales[0] * scales[1], Vt[:kept] @ Q.mT, dropped


def _size(B: Tensor, A: Tensor) -> float:
    """Σ_i |b_i|·|a_i| over the columns of B and the rows of A: no less than any norm of B·A."""
    return float((B.norm(dim=0) * A.norm(dim=1)).sum())


def _power_of_two(value: Tensor) -> float:
    """A power of two near the largest entry, 1 if there is none."""
    largest = float(value.abs().max()) if value.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest > 0 else 1.0


def check_products(pairs: Sequence[Pair], weights: Sequence[float], scales: Sequence[float] | None = None) -> None:
    """Raise ValueError unless all pairs multiply to one shape, everything is finite, and there is a weight (and scale)
    for each.
    """
    if not pairs or len(pairs) != len(weights) or (scales is not None and len(scales) != len(pairs)):
        counts = f"{len(pairs)} products, {len(weights)} weights" + (
            f", {len(scales)} scales" if scales is not None else ""
        )
        raise ValueError(f"want one weight (and scale) per product, at least one; got {counts}")
    m, n = pairs[0][0].shape[:1], pairs[0][1].shape[1:]
    for B, A in pairs:
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or (B.shape[:1], A.shape[1:]) != (m, n):
            raise ValueError(
                f"B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply to {'×'.join(map(str, (*m, *n)))}"
            )
        if not (bool(torch.isfinite(B).all()) and bool(torch.isfinite(A).all())):
            raise ValueError("a factor holds NaN or infinite entries; exclude the update that brought them")
    for number in (*weights, *(scales or ())):
        if not math.isfinite(number):
            raise ValueError(f"weights and scales must be finite, got {number}")
