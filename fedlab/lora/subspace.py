"""Open new directions for A beside those that are kept: orthonormal rows, deterministic, from random draws or from
given candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def open_rows(kept: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Orthonormal rows from the span of candidates, orthogonal to the rows that are kept.

    Candidates are taken in their order (Gram–Schmidt, twice, in float64); one that adds nothing new (less than 1e-6 of
    its length) is skipped.

    Args:
        kept: [k, n], orthonormal rows; k may be 0.
        candidates: [c, n].
        count: new rows, 0 ≤ count ≤ n − k.

    Returns:
        [count, n], float64 if ``kept`` is, else float32.

    Raises:
        ValueError: the candidates run out or have another length, ``count`` is out of range, or input is not finite.
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
        # Squares of very small or large entries are no numbers.
        row = row / row.abs().max().clamp_min(torch.finfo(row.dtype).tiny)
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
