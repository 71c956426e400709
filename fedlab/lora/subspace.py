"""Open new directions for A beside those that are kept: orthonormal rows, deterministic, from random draws or from
given candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def open_rows(kept: Tensor, candidates: Tensor, count: int) -> Tensor:
    """``count`` orthonormal rows [count, n], orthogonal to the orthonormal rows ``kept`` [k, n], from the span of
    ``candidates`` [c, n].

    Candidates are taken in their order (Gram–Schmidt, twice, in float64); one that adds nothing new (less than 1e-6 of
    its length) is skipped. Raises ValueError if the candidates run out or have another length, if count < 0 or count +
    k > n, or for non-finite input.
    """
    n = kept.shape[-1]
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    if candidates.shape[-1] != n:
        raise ValueError(f"candidates have length {candidates.shape[-1]}, want that of the kept rows, {n}")
    if count + len(kept) > n:
        raise ValueError(f"{count} directions beside {len(kept)} are more than the {n} there are; lower the rank")
    for name, value in (("kept", kept), ("candidates", candidates)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinite entries")
    basis = kept.double()
    for row in candidates.double():
        if len(basis) == len(kept) + count:
            break
        row = row / row.abs().max().clamp_min(
            torch.finfo(row.dtype).tiny
        )  # squares of very small or large entries are no numbers
        length = float(row.norm())
        for _ in range(2):
            row = row - (basis @ row) @ basis
        if float(row.norm()) > 1e-6 * length > 0:
            basis = torch.cat([basis, (row / row.norm())[None]])
    if len(basis) < len(kept) + count:
        raise ValueError(
            f"{len(candidates)} candidates opened {len(basis) - len(kept)} new directions, {count} are needed; offer"
            " more"
        )
    return basis[len(kept) :].to(torch.float64 if kept.dtype == torch.float64 else torch.float32)
