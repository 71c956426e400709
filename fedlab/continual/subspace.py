"""Subspaces that earlier tasks use, and the changes of a weight that leave them alone.

Bases are orthonormal **rows**, [k, n], as LoRA's A is. A change ΔW of W [m, n] leaves an input x alone if ΔW·x = 0:
input-side protection of the rows R is ΔW = ΔW(I − RᵀR). OSFT (arXiv 2504.07097) protects outputs too: ΔW = (I −
LᵀL)·ΔW·(I − RᵀR) with the leading singular vectors L, R of W. (The paper's Eq. for the projected gradient removes the
L–R block only, and does not protect: an input in R's span still changes its output. The factor form that the paper
trains is the two-sided one, which is here.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlab.errors import FedlabError
from fedlab.lora.svd import row_signs

RESIDUAL = 1e-6  # of a singular triplet, relative to the largest singular value: where the iteration may stop
ORTHONORMAL = 1e-4  # how far P·Pᵀ may be from I: float32 after a trip over the wire


class CapacityExhausted(FedlabError):
    """The protected subspace leaves too little to train the next task in."""


@dataclass(frozen=True)
class Triplets:
    """k singular triplets of W: ``left`` [k, m] and ``right`` [k, n] are orthonormal rows, ``values`` [k] descend.
    float64.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def leading_triplets(weight: Tensor, count: int, iterations: int = 60) -> Triplets:
    """The ``count`` leading singular triplets of ``weight`` [m, n]; signs as in ``refactorize``, deterministic.

    Block subspace iteration (Halko et al., arXiv 0909.4061) where count is small against min(m, n): O(m·n·count) per
    iteration, until ‖W·v − s·u‖ <= 1e-6·s_1 for every triplet. A spectrum too flat for that, and a large count, are
    decomposed whole. Where singular values are equal at the cut, which of their directions belong to it is this
    function's choice. Raises ValueError for a count outside [0, min(m, n)] or non-finite entries.
    """
    m, n = weight.shape
    small = min(m, n)
    if not 0 <= count <= small:
        raise ValueError(f"count = {count} triplets of a {m}×{n} weight; want 0 to {small}")
    _finite("weight", weight)
    W = weight.detach().to("cpu", torch.float64)
    found = _iterate(W, count, iterations) if 0 < 4 * count <= small and small >= 64 else None
    U, S, Vt = found if found is not None else torch.linalg.svd(W, full_matrices=False)
    right = Vt[:count]
    signs = row_signs(right) if count else right[:, 0]
    return Triplets(U[:, :count].mT * signs[:, None], S[:count], right * signs[:, None])


def _iterate(W: Tensor, count: int, iterations: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading triplets by subspace iteration from a fixed Gaussian start; None if they do not settle, as soon as that
    can be seen.
    """
    width = min(count + max(16, count // 2), min(W.shape))
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], width, generator=generator, dtype=W.dtype)).Q
    before = math.inf
    for step in range(iterations):
        P = torch.linalg.qr(W.mT @ Q).Q
        Q, R = torch.linalg.qr(W @ P)
        if step % 5 != 4:
            continue
        U, S, Vt = torch.linalg.svd(R)
        left, right = Q @ U[:, :count], Vt[:count] @ P.mT
        backward = (left.mT @ W - S[:count, None] * right).norm(dim=1)  # W·v = s·u holds by construction
        worst = float(backward.max() / S[0])
        if worst <= RESIDUAL:
            return left, S[:count], right
        shrunk, before = worst / before, worst  # 0 at the first look
        if shrunk >= 1 or (shrunk > 0 and step + 5 * math.log(RESIDUAL / worst) / math.log(shrunk) > iterations):
            return None  # at this pace it will not settle in time
    return None


def complement(rows: Tensor) -> Tensor:
    """Orthonormal rows [n − k, n] that complete the orthonormal rows [k, n] to a basis. Deterministic; the dtype of
    ``rows``.

    Raises ValueError if ``rows`` are not orthonormal to 1e-4, or more than n.
    """
    k, n = rows.shape
    check_orthonormal(rows)
    if k == 0:
        return torch.eye(n, dtype=rows.dtype)
    Q = (
        torch.linalg.qr(rows.double().mT, mode="complete").Q[:, k:].mT
    )  # orthogonal to the span of the rows as they are, rounded or not
    rest: Tensor = Q * row_signs(Q)[:, None] if len(Q) else Q
    return rest.to(rows.dtype)


def check_orthonormal(rows: Tensor, name: str = "rows") -> None:
    """Raise ValueError unless ``rows`` [k, n] are finite and orthonormal to 1e-4."""
    k, n = rows.shape
    if k > n:
        raise ValueError(f"{name}: {k} rows of length {n} cannot be orthonormal")
    _finite(name, rows)
    wide = rows.double()
    if k and float((wide @ wide.mT - torch.eye(k, dtype=torch.float64)).abs().max()) > ORTHONORMAL:
        raise ValueError(f"{name} [{k}, {n}] are not orthonormal; pass what orthonormal_rows gives")


def leak(delta: Tensor, left: Tensor | None, right: Tensor | None) -> float:
    """Largest share of ΔW in a protected side: max(‖L·ΔW‖, ‖ΔW·Rᵀ‖) / ‖ΔW‖ (Frobenius). 0 for ΔW = 0."""
    wide = delta.double()
    total = float(wide.norm())
    inside = [0.0]
    if right is not None:
        inside.append(float((wide @ right.double().mT).norm()))
    if left is not None:
        inside.append(float((left.double() @ wide).norm()))
    return max(inside) / total if total else 0.0


def extend(rows: Tensor, gram: Tensor, energy: float, most: int, floor: float = 0.0, name: str = "module") -> Tensor:
    """The protected rows [k, n] and as many further directions of the inputs as it takes to hold ``energy`` of their
    second moment.

    Args:
        rows: [k, n] orthonormal, what is protected so far; they come first in the result, as they are (P_t ⊇ P_t−1).
        gram: [n, n] symmetric, Σ x·xᵀ over the task's inputs of this layer, possibly noised (then not positive
        semidefinite). energy: share in (0, 1] of trace(gram) that the result must hold (GPM, arXiv 2103.09762, Eq. 9).
        most: rows that the result may have. floor: a direction whose residual eigenvalue is not above it is noise and
        never taken. name: the layer, for the error.

    Returns:
        [k', n], k' >= k, of ``rows``' dtype. Inputs that are covered already add nothing: the same task twice does not
        grow it.

    Raises:
        CapacityExhausted: more than ``most`` rows would be needed. ValueError: energy outside (0, 1], or entries that
        are not finite.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    check_orthonormal(rows)
    _finite("gram", gram)
    P, G = rows.double(), gram.double()
    G = (G + G.mT) / 2
    total, held = float(G.trace()), float(((P @ G) * P).sum())
    if total <= 0 or held >= energy * total:
        return rows
    residual = G - P.mT @ (P @ G)
    residual = residual - (residual @ P.mT) @ P
    values, vectors = torch.linalg.eigh((residual + residual.mT) / 2)
    values, vectors = values.flip(0), vectors.mT.flip(0)
    smallest = max(floor, 1e-12 * total)
    count = 0
    while count < len(values) and held < energy * total and float(values[count]) > smallest:
        held, count = held + float(values[count]), count + 1
    if len(P) + count > most:
        raise CapacityExhausted(
            f"{name}: {len(P) + count} of {P.shape[1]} input directions would be protected, {most} may be; "
            f"lower strategy.energy (now {energy:g}) or strategy.free, or end the stream here"
        )
    new = vectors[:count]
    new = new - (new @ P.mT) @ P
    if count:
        new = torch.linalg.qr(new.mT).Q.mT
        new = new * row_signs(new)[:, None]
    return torch.cat([P, new]).to(rows.dtype)


def _finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinite entries")
