"""Refactorise a low-rank product without ever forming it.

For B [m, r] and A [r, n]: Aᵀ = Q R_A and B = P R_B (thin QR), and the SVD of the r×r matrix R_B R_Aᵀ = U Σ Vᵀ gives
B·A = (P U Σ)(Vᵀ Qᵀ). Cost O((m + n) r² + r³), memory O((m + n) r). This is FedSVD's server step (arXiv 2505.12805, Eq.
7), whose published code forms and decomposes the m×n product instead. Everything is computed in float64 and returned in
float32 (float64 stays).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlab.lora.state import State, modules


def refactorize(B: Tensor, A: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """(B2, A2) with the same product, orthonormal rows of A2, and the singular values in B2.

    Args:
        B: [..., m, r], any floating dtype; leading dimensions are a batch.
        A: [..., r, n].
        rank: rank of the result; default r. Smaller truncates to the best approximation of that rank (Eckart–Young),
            larger pads B2 with zero columns and A2 with further orthonormal rows.

    Returns:
        B2 [..., m, rank], whose columns are orthogonal with norms = singular values in descending order, and A2 [...,
        rank, n] with A2·A2ᵀ = I also where B·A is rank-deficient or zero: spare rows come from the span of A's rows
        first. The largest entry of each row of A2 (by magnitude, the first of equals) is positive.

    Raises:
        ValueError: shapes do not fit, rank > min(m, n), or an entry is NaN or infinite.
    """
    m, r, n = B.shape[-2], A.shape[-2], A.shape[-1]
    if B.shape[-1] != r or B.shape[:-2] != A.shape[:-2]:
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply: want [..., m, r] and [..., r, n]")
    rank = r if rank is None else rank
    if not 1 <= rank <= min(m, n) or r > min(m, n):
        raise ValueError(
            f"rank = {max(rank, r)} must be in [1, min(m, n)] = [1, {min(m, n)}]: a {m}×{n} layer has no more"
            " directions; lower it"
        )
    for name, value in (("B", B), ("A", A)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinite entries; exclude the update that brought them")
    dtype = torch.float64 if B.dtype == torch.float64 else torch.float32
    P, R_B = torch.linalg.qr(B.double())
    Q, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vt = torch.linalg.svd(R_B @ R_A.mT)
    B2, A2 = (P @ U) * S.unsqueeze(-2), Vt @ Q.mT
    if rank < r:
        B2, A2 = B2[..., :rank], A2[..., :rank, :]
    elif rank > r:
        B2, A2 = torch.nn.functional.pad(B2, (0, rank - r)), _extend(A2, rank)
    signs = row_signs(A2)
    return (B2 * signs.unsqueeze(-2)).to(dtype), (A2 * signs.unsqueeze(-1)).to(dtype)


def orthonormal_rows(A: Tensor) -> Tensor:
    """Orthonormal basis of A's rows, [r, n] → [r, n]: the Q factor of Aᵀ, with the signs that make R's diagonal
    positive.

    This is the A₀ := QR(A₀) under which FFA-LoRA equals FedSVD. Raises ValueError if r > n.
    """
    r, n = A.shape[-2:]
    if r > n:
        raise ValueError(f"{r} rows of length {n} cannot be orthonormal; lower the rank to at most {n}")
    Q, R = torch.linalg.qr(A.double().mT)
    signs = torch.where(torch.diagonal(R, dim1=-2, dim2=-1) < 0, -1.0, 1.0).double()
    rows: Tensor = (Q * signs.unsqueeze(-2)).mT.to(torch.float64 if A.dtype == torch.float64 else torch.float32)
    return rows


def rotation(A_new: Tensor, A_old: Tensor) -> Tensor:
    """The r×r matrix A_new·A_oldᵀ. State that is linear in B (momentum, control variates) maps as M → M·rotationᵀ."""
    return A_new @ A_old.mT


def refactorize_state(state: State) -> State:
    """``refactorize`` every LoRA pair of a state, modules of equal shape in one batched call; other tensors pass
    through.
    """
    groups: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for module in modules(state):
        groups.setdefault((state[f"{module}.lora_B"].shape, state[f"{module}.lora_A"].shape), []).append(module)
    result = dict(state)
    for group in groups.values():
        B, A = (torch.stack([state[f"{module}.{part}"] for module in group]) for part in ("lora_B", "lora_A"))
        for module, b, a in zip(group, *refactorize(B, A), strict=True):
            result[f"{module}.lora_B"], result[f"{module}.lora_A"] = b, a
    return result


def _extend(A: Tensor, rank: int) -> Tensor:
    """More orthonormal rows: Householder QR of [Aᵀ, e_1, e_2, …] keeps A's rows (up to sign, restored) and completes
    them.
    """
    n, r = A.shape[-1], A.shape[-2]
    axes = torch.eye(n, min(n, rank), dtype=A.dtype, device=A.device).expand(*A.shape[:-2], n, min(n, rank))
    Q, R = torch.linalg.qr(torch.cat([A.mT, axes], dim=-1))
    pivots = torch.diagonal(R, dim1=-2, dim2=-1).abs()
    pivots[..., :r] = float("inf")  # A's own rows first, then the axes that add most
    order = torch.sort(pivots, dim=-1, descending=True, stable=True).indices[..., :rank]
    rows = torch.gather(Q.mT, -2, order.unsqueeze(-1).expand(*order.shape, n))
    return torch.cat([A, rows[..., r:, :]], dim=-2)


def principal_rows(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading eigenvectors of a symmetric G = XᵀX [n, n] as orthonormal rows [r, n], which are X's leading
    right singular vectors, signs as in ``refactorize``; and their eigenvalues, descending. float64.
    """
    values, vectors = torch.linalg.eigh(gram.double())  # ascending
    rows: Tensor = vectors.mT.flip(0)[:rank]
    return rows * row_signs(rows)[:, None], values.flip(0)[:rank]


def row_signs(A: Tensor) -> Tensor:
    """±1 per row [..., r]: the sign of its largest entry."""
    largest = torch.gather(A, -1, A.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(largest < 0, -1.0, 1.0).to(A.dtype)
