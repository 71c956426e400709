"""Truncation that spends the rank on the rows that matter: FWSVD (Hsu et al. 2022, arXiv 2207.00112), on factors.

FWSVD weighs every row of a matrix D by the root of its Fisher information, w_i = Σ_j E[g_ij²], and takes Î⁻¹·SVD_r(Î·D)
with Î = diag(√w). That is D·V·Vᵀ with V the leading right singular vectors of Î·D, which divides by no weight and says
what becomes of rows that weigh nothing. Thin QR and small SVDs only, as in ``fedlab.lora.exact``; the m×n matrix is
never formed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlab.lora.exact import check_products, decompose
from fedlab.lora.ranks import truncate
from fedlab.lora.state import State
from fedlab.seeds import client_order


def truncate_weighted(
    B: Tensor, A: Tensor, rank: int, row_weights: Tensor, split: str = "sqrt"
) -> tuple[Tensor, Tensor]:
    """The X = B2·A2 of a rank that minimises ‖diag(√w)·(B·A − X)‖_F.

    Rows with w = 0 do not choose directions; they are projected onto those that the others chose. If the weighted rows
    need fewer than ``rank`` directions, the rest go to what is left of B·A, unweighted: together the limit of w + ε for
    ε → 0. So if all weights are equal or all are zero the result is that of ``truncate``, bit for bit.

    Args:
        B: [m, k].
        A: [k, n].
        rank: in [1, min(m, n)].
        row_weights: w [m], finite and ≥ 0; only their ratios count.
        split: of the singular values of X itself, as in ``truncate``.

    Returns:
        B2 [m, rank] and A2 [rank, n], float64.

    Raises:
        ValueError: weights of another shape, negative or not finite, and whatever ``truncate`` refuses.
    """
    check_products([(B, A)], [1.0])
    if row_weights.shape != B.shape[:1]:
        raise ValueError(f"row_weights have shape {tuple(row_weights.shape)}, want one per row of B, ({B.shape[0]},)")
    w = row_weights.double()
    if not bool(torch.isfinite(w).all()) or bool((w < 0).any()):
        raise ValueError(f"row_weights must be finite and >= 0, got {w[~(torch.isfinite(w) & (w >= 0))][0].item()}")
    if all_equal(w):
        return truncate(B, A, rank, split)
    B, A = B.double(), A.double()
    V = decompose((w / w.max()).sqrt()[:, None] * B, A, max(rank, 0))[2]  # [k', n], k' <= rank
    U, S, V_rest, _ = decompose(B, A - (A @ V.mT) @ V, max(rank - len(V), 0))
    return truncate(torch.cat([B @ (A @ V.mT), U * S], 1), torch.cat([V, V_rest]), rank, split)


def all_equal(row_weights: Tensor) -> bool:
    """Whether the weights say nothing: all the same, or none at all."""
    return not len(row_weights) or bool(row_weights.max() == row_weights.min())


def row_weights_of(updates: Mapping[str, State], weights: Mapping[str, float], module: str) -> Tensor:
    """w_i = Σ_k p_k Σ_j (ΔB_k)_ij² [m] of one module, float64, summed in client order: a stand-in for FWSVD's squared
    gradients.

    A client's ΔB is its summed steps on B, so this needs nothing but what was sent: no further bytes, and no privacy
    where the updates are noised already. The noise then adds about the same to every row and draws the weights
    together. Raises ValueError without clients or without their lora_B.
    """
    name = f"{module}.lora_B"
    clients = sorted(updates, key=client_order)
    if missing := [client for client in clients if name not in updates[client]]:
        raise ValueError(f"{missing[0]} sent no {name}: there is nothing to estimate its rows' weights from")
    if not clients:
        raise ValueError("no update to estimate the rows' weights from")
    result = torch.zeros(len(updates[clients[0]][name]), dtype=torch.float64)
    for client in clients:
        result += weights[client] * updates[client][name].double().square().sum(1)
    return result
