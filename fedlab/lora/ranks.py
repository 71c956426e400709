"""One product at several ranks: truncate, pad, narrow and widen. Compact: thin QR and small SVDs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlab.lora.exact import check_products, compress, decompose
from fedlab.lora.state import State, part_of

SPLITS = ("sqrt", "left")


def truncate(B: Tensor, A: Tensor, rank: int, split: str = "sqrt") -> tuple[Tensor, Tensor]:
    """Best approximation of B·A of a rank (Eckart–Young), float64, always [m, rank] and [rank, n]: missing directions
    are zero.

    ``split``: "sqrt" puts √Σ on both factors, "left" all of Σ on B (A then has orthonormal rows where it is not zero).
    Raises ValueError for rank outside [1, min(m, n)], an unknown split, shapes that do not multiply or non-finite
    entries.
    """
    check_products([(B, A)], [1.0])
    m, n = B.shape[0], A.shape[1]
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank = {rank} must be in [1, min(m, n)] = [1, {min(m, n)}]")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    U, S, Vt, _ = decompose(B, A, rank)
    left, right = (S.sqrt(), S.sqrt()) if split == "sqrt" else (S, torch.ones_like(S))
    return pad(U * left, right[:, None] * Vt, rank)


def pad(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Zero columns for B *and* zero rows for A up to ``rank`` (HetLoRA, arXiv 2401.06432): the same product, and
    training leaves them zero.

    Raises ValueError if the pair has a larger rank already, or if B and A differ in theirs.
    """
    have = B.shape[1]
    if A.shape[0] != have:
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not multiply")
    if have > rank:
        raise ValueError(f"rank = {rank} is below the {have} that the factors have; truncate them")
    zeros = torch.nn.functional.pad
    return zeros(B, (0, rank - have)), zeros(A, (0, 0, 0, rank - have))


def narrow(state: Mapping[str, Tensor], rank: int) -> State:
    """The first ``rank`` directions of every LoRA pair (rows of A, columns of B), not copied; head and residual as they
    are.

    What a client of that rank starts from. Where the strategy keeps the directions sorted (FedSVD, FlexLoRA) it is the
    best approximation.
    """
    result = dict(state)
    for name, value in state.items():
        if (part := part_of(name)) in ("lora_A", "lora_B"):
            result[name] = value[:rank] if part == "lora_A" else value[:, :rank]
    return result


def widen(update: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """The update of a client of lower rank in the shapes of ``like``: zero in the directions that the client does not
    have.
    """
    result = dict(update)
    for name, value in update.items():
        if (shape := like[name].shape) != value.shape:
            result[name] = torch.nn.functional.pad(value, (0, shape[1] - value.shape[1], 0, shape[0] - value.shape[0]))
    return result


def frobenius_norm(B: Tensor, A: Tensor) -> float:
    """‖B·A‖_F ≥ 0, exactly 0 where the product is rounding.

    ValueError if shapes do not fit or an entry is not finite.
    """
    return compress(B, A, rank=0)[2]
