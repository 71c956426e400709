"""One low-rank matrix out of many copies B_k·A_k of which a minority may be anything.

Not a rule over factors (``fedlab.lora.robust``): the median of factors is no median of products. Pure functions, in
float64 throughout; source and evidence are in ``robust_low_rank``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlab.lora.rows import LARGEST, usable, weighted_median
from fedlab.lora.svd import refactorize

Pairs = Sequence[tuple[Tensor, Tensor]]
LEAST = 1e-16  # of a squared residual whose scale is 1: below is rounding


def robust_low_rank(
    factors: Pairs,
    rank: int,
    *,
    weights: Sequence[float] | None = None,
    iterations: int = 2000,
    step: float = 0.5,
    init: float = 1e-2,
    tolerance: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """One matrix of rank ≤ ``rank`` from K copies B_k·A_k, a minority of which may be anything: argmin_{U,V} Σ_k w_k
    ‖U·Vᵀ − B_k·A_k‖_F.

    The sub-gradient method on the factors from a small start, after Ma and Fattahi 2022 (arXiv 2202.08788): with G =
    Σ_k w_k (X − X_k)/‖X − X_k‖_F, (U, V) ← (U − η·G·V, V − η·Gᵀ·U), from init × the balanced root of −G(0) truncated to
    the rank. The small start lets strong directions grow first and makes a rank that is too large harmless. η_t = step
    × the weighted median of the ‖X_t − X_k‖, in units where the median ‖X_k‖ is 1: it shrinks with the *honest*
    residuals, linearly, where the loss itself stays up for the outliers.

    The paper's loss is ℓ1 over scalar measurements. Here the unit that lies is a client, so the residuals are not
    squared *per client* and are Frobenius norms within one. That is also what makes compact coordinates exact: with
    thin QRs [B_1 … B_K] = P·R_B and [A_1ᵀ … A_Kᵀ] = Q·R_A, every X_k and the minimiser are P·(·)·Qᵀ, Frobenius norms do
    not see P and Q, and the m×n matrix is never formed (an iteration costs O((K r)² rank)). An entry-wise ℓ1 would
    change under the rotation and spread a sparse corruption over all coordinates; a client that corrupts few entries is
    outvoted here as a whole. The paper's theorem (PSD matrices, Sign-RIP measurements) does not cover this loss; the
    tests are the evidence. Breakdown: less than half of the weight, as any spatial median. Equal honest copies are
    recovered exactly; honest copies that differ by s leave an error of order s, unlike a mean's s/√K.

    Args:
        factors: (B_k [m, r_k], A_k [r_k, n]); ranks may differ. The order is the caller's to fix (client order): it
            decides the last bits.
        rank: in [1, min(m, n)].
        weights: one ≥ 0 per copy; default equal.
        iterations: at most so many, ≥ 1.
        step: η in units of the honest residuals, in (0, 1].
        init: size of the start, in (0, 1).
        tolerance: ≥ 0; stop once a step moves (U, V) by less than this share.

    Returns:
        B [m, rank], A [rank, n] as ``refactorize`` gives them (orthonormal rows in A), float32 unless the input is
        float64. If more than half of the weight sent zero matrices, B is zero.

    Raises:
        ValueError: no copy, misfitting shapes, unusable weights or options, a rank out of range, NaN or infinite
            factors (with the position of the copy).
    """
    if not (0 < step <= 1 and 0 < init < 1):
        raise ValueError(
            f"step and init must be in (0, 1] and (0, 1), got {step} and {init}; the defaults are 0.5 and 0.01"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}; 0 runs all iterations")
    share = _shares(factors, rank, weights)
    m, n = factors[0][0].shape[0], factors[0][1].shape[1]
    dtype = torch.promote_types(factors[0][0].dtype, factors[0][1].dtype)
    copies = _compact(factors)
    unit = weighted_median(copies.norms, share)
    if unit == 0:
        return refactorize(torch.zeros(m, rank, dtype=dtype), torch.zeros(rank, n, dtype=dtype))
    copies = copies.divided(unit)
    U, V = _start(copies, share, rank, init)
    U, V = _descend(copies, share, (U, V), iterations, step, tolerance)
    B, A = refactorize(copies.P @ U * unit, (copies.Q @ V).mT, rank)
    return (B, A) if dtype == torch.float64 else (B.float(), A.float())


@dataclass(frozen=True)
class _Copies:
    """K products X_k = P·(R_B restricted to k's columns)·(R_A restricted to k's columns)ᵀ·Qᵀ in compact coordinates."""

    P: Tensor  # [m, p], orthonormal columns
    Q: Tensor  # [n, q], orthonormal columns
    R_B: Tensor  # [p, Σ r_k]
    R_A: Tensor  # [q, Σ r_k]
    owner: Tensor  # [K, Σ r_k], 1 where a column is k's
    square: Tensor  # [K], ‖X_k‖²
    norms: Tensor  # [K], ‖X_k‖

    def divided(self, unit: Tensor) -> _Copies:
        """The products divided by ``unit``."""
        root = unit.sqrt()
        return _Copies(
            self.P, self.Q, self.R_B / root, self.R_A / root, self.owner, self.square / unit**2, self.norms / unit
        )


def _compact(factors: Pairs) -> _Copies:
    P, R_B = torch.linalg.qr(torch.cat([B.double() for B, _ in factors], dim=1))
    Q, R_A = torch.linalg.qr(torch.cat([A.double().mT for _, A in factors], dim=1))
    owner = torch.block_diag(*(torch.ones(1, B.shape[1], dtype=torch.float64) for B, _ in factors))
    own = owner.mT @ owner
    square = owner @ ((R_B.mT @ R_B) * (R_A.mT @ R_A) * own).sum(1)
    return _Copies(P, Q, R_B, R_A, owner, square, square.clamp(min=0).sqrt())


def _start(copies: _Copies, share: Tensor, rank: int, init: float) -> tuple[Tensor, Tensor]:
    """U [p, rank], V [q, rank]: init × the balanced root of −G(0), truncated to the rank."""
    pull = torch.where(copies.norms > 0, share / copies.norms, torch.zeros_like(copies.norms))
    left, size, right = torch.linalg.svd((copies.R_B * (pull @ copies.owner)) @ copies.R_A.mT, full_matrices=False)
    inner = min(rank, len(size))
    U, V = (init * basis[:, :inner] * size[:inner].sqrt() for basis in (left, right.mT))
    return U, V


def _descend(
    copies: _Copies, share: Tensor, start: tuple[Tensor, Tensor], iterations: int, step: float, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The sub-gradient method from ``start``; see ``robust_low_rank`` for its symbols."""
    R_B, R_A, owner = copies.R_B, copies.R_A, copies.owner
    U, V = start
    for _ in range(iterations):
        M, N = R_B.mT @ U, R_A.mT @ V  # [Σ r_k, rank]
        UU, VV = U.mT @ U, V.mT @ V
        residuals = (copies.square + (UU * VV).sum() - 2 * (owner @ (M * N).sum(1))).clamp(min=LEAST).sqrt()  # [K]
        pull = share / residuals
        eta = step * weighted_median(residuals, share)
        dU = eta * (pull.sum() * U @ VV - R_B @ ((pull @ owner)[:, None] * N))
        dV = eta * (pull.sum() * V @ UU - R_A @ ((pull @ owner)[:, None] * M))
        U, V = U - dU, V - dV
        if dU.square().sum() + dV.square().sum() <= tolerance**2 * (U.square().sum() + V.square().sum()):
            break
    return U, V


def _shares(factors: Pairs, rank: int, weights: Sequence[float] | None) -> Tensor:
    """Check the factor pairs; the weights as shares that sum to 1."""
    if not factors:
        raise ValueError("no factor pair to recover a matrix from")
    m, n = factors[0][0].shape[0], factors[0][1].shape[-1]
    for k, (B, A) in enumerate(factors):
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or (B.shape[0], A.shape[1]) != (m, n):
            raise ValueError(
                f"copy {k}: B {tuple(B.shape)} and A {tuple(A.shape)} do not fit: want [{m}, r] and [r, {n}]"
            )
        if not (usable(B, LARGEST**0.5) and usable(A, LARGEST**0.5)):
            raise ValueError(f"copy {k} holds NaN, infinite or huge values; exclude it first (see check_update)")
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank = {rank} must be in [1, {min(m, n)}]: a {m}×{n} matrix has no more directions")
    own = [1.0] * len(factors) if weights is None else list(weights)
    if len(own) != len(factors) or not all(math.isfinite(w) and w >= 0 for w in own) or not math.fsum(own) > 0:
        raise ValueError(f"weights must be {len(factors)} finite numbers >= 0, not all 0, got {own}")
    return torch.tensor(own, dtype=torch.float64) / math.fsum(own)
