"""What inputs a task used, learnt without seeing them: a clipped and noised sum of Gram matrices.

A record's tokens X [T, n] at one layer have the Gram matrix XᵀX. Σ XᵀX over records is what ``subspace.extend`` needs;
one record's alone reveals its activations exactly. So each record's matrices (all layers together) are scaled down to
joint Frobenius norm ``clip``, and Gaussian noise of standard deviation σ·clip lands on every entry of the upper
triangle ("Analyze Gauss", Dwork et al. 2014): adding or removing one record moves the released triangle by at most
``clip``, so it is one Gaussian mechanism of noise multiplier σ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedlab._validate import positive
from fedlab.privacy.noise import GaussianNoise

STEP, LIMIT = (
    2.0**24,
    2.0**28,
)  # of fixed point: resolution, and the largest entry of one client, so that 2,000 of them fit 63 bits


def clipped_grams(inputs: Mapping[str, Tensor], mask: Tensor, clip: float) -> tuple[dict[str, Tensor], float]:
    """Σ over records of f_i·X_iᵀX_i per layer [n, n], float64, with f_i = min(1, clip / joint Frobenius norm of record
    i's matrices).

    Args:
        inputs: layer → [N, T, n], what the layer is given.
        mask: [N, T], 0 for padding.
        clip: largest joint norm; ``math.inf`` for none.

    Returns:
        The sums, and the share of records that were scaled down. A record with a value that is not finite counts as
        zero.
    """
    count = mask.shape[0]
    squares = torch.zeros(count, dtype=torch.float64)
    kept = {name: x.detach().to("cpu", torch.float64) * mask.cpu().unsqueeze(-1) for name, x in sorted(inputs.items())}
    for x in kept.values():
        small = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x  # ‖XᵀX‖ = ‖XXᵀ‖
        squares += small.square().flatten(1).sum(1)
    norms = squares.sqrt()
    usable = torch.isfinite(norms)
    factors = torch.where(usable & (norms > clip), clip / norms, usable.double())
    sums = {}
    for name, x in kept.items():
        mine = x[usable] * factors[usable].sqrt()[:, None, None]
        flat = mine.flatten(0, 1)
        sums[name] = flat.mT @ flat
    return sums, float((norms > clip).double().mean()) if count else 0.0


def privatise(grams: Mapping[str, Tensor], sigma: float, clip: float, noise: GaussianNoise) -> dict[str, Tensor]:
    """The sums with N(0, (σ·clip)²) on every entry of the upper triangle, mirrored.

    Layers are noised in the order of their names.
    """
    positive(sigma=sigma)
    positive(clip=clip)
    released = {}
    for name, gram in sorted(grams.items()):
        upper = torch.triu(gram.double() + noise.draw(tuple(gram.shape), sigma * clip))
        released[name] = upper + torch.triu(upper, 1).mT
    return released


def noise_floor(n: int, sigma: float, clip: float, clients: int = 1) -> float:
    """Largest eigenvalue that the noises of ``clients`` together make of nothing in a symmetric n×n matrix: std·(2√n +
    2·n^(−1/6)).

    The edge of the semicircle law and, with 99 % probability, what is beyond it (Tracy–Widom).
    """
    edge: float = 2 * math.sqrt(n) + 2 * float(n) ** (-1 / 6)
    return sigma * clip * math.sqrt(clients) * edge


def to_fixed(grams: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The upper triangles, row by row, in fixed point (2⁻²⁴, int64 [n(n+1)/2]).

    Sums of these are exact in any order, so neither the number of nodes nor masks change a bit.

    Raises ValueError for a value that is not finite or beyond ±2²⁸.
    """
    fixed = {}
    for name, gram in grams.items():
        if not bool((gram.abs() < LIMIT).all()):
            raise ValueError(
                f"the Gram matrix of {name} holds values that are not finite or above {LIMIT:g}; lower"
                " strategy.gram.clip"
            )
        fixed[name] = np.rint(gram.double().numpy()[np.triu_indices(len(gram))] * STEP).astype(np.int64)
    return fixed


def from_fixed(values: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Inverse of ``to_fixed``: symmetric, float64."""
    grams = {}
    for name, value in values.items():
        n = side(len(value))
        upper = np.zeros((n, n))
        upper[np.triu_indices(n)] = value.astype(np.float64) / STEP
        grams[name] = torch.from_numpy(upper + np.triu(upper, 1).T)
    return grams


def side(length: int) -> int:
    """n of an upper triangle of n(n+1)/2 entries. Raises ValueError for a length that is none."""
    n = (math.isqrt(8 * length + 1) - 1) // 2
    if n * (n + 1) // 2 != length:
        raise ValueError(f"{length} entries are no triangle of a square matrix")
    return n
