"""What inputs a task used, learnt without seeing them: a clipped and noised sum of Gram matrices.

A record's tokens X [T, n] at one layer have the Gram matrix XᵀX. Σ XᵀX over records is what ``subspace.extend`` needs; one record's alone
reveals its activations exactly. So each record's matrices (all layers together) are scaled down to joint Frobenius norm ``clip``, and
Gaussian noise of standard deviation σ·clip lands on every entry of the upper triangle ("Analyze Gauss", Dwork et al. 2014): adding or
removing one record moves the released triangle by at most ``clip``, so it is one Gaussian mechanism of noise multiplier σ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedlab._validate import positive
from fedlab.privacy.noise import GaussianNoise


def clipped_grams(inputs: Mapping[str, Tensor], mask: Tensor, clip: float) -> tuple[dict[str, Tensor], float]:
    """Σ over records of f_i·X_iᵀX_i per layer [n, n], float64, with f_i = min(1, clip / joint Frobenius norm of record i's matrices).

    Args:
        inputs: layer → [N, T, n], what the layer is given.
        mask: [N, T], 0 for padding.
        clip: largest joint norm; ``math.inf`` for none.

    Returns:
        The sums, and the share of records that were scaled down. A record with a value that is not finite counts as zero.
    """
    count = mask.shape[0]
    squares = torch.zeros(count, dtype=torch.float64)
    kept = {name: (x.detach() * mask.unsqueeze(-1)).to("cpu", torch.float64) for name, x in sorted(inputs.items())}
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
    """The sums with N(0, (σ·clip)²) on every entry of the upper triangle, mirrored. Layers are noised in the order of their names."""
    positive(sigma=sigma)
    positive(clip=clip)
    released = {}
    for name, gram in sorted(grams.items()):
        upper = torch.triu(gram.double() + noise.draw(tuple(gram.shape), sigma * clip))
        released[name] = upper + torch.triu(upper, 1).mT
    return released


def noise_floor(n: int, sigma: float, clip: float, clients: int = 1) -> float:
    """Largest eigenvalue that the noises of ``clients`` together make of nothing in a symmetric n×n matrix: std·(2√n + 2·n^(−1/6)).

    The edge of the semicircle law and, with 99 % probability, what is beyond it (Tracy–Widom).
    """
    return sigma * clip * math.sqrt(clients) * (2 * math.sqrt(n) + 2 * n ** (-1 / 6))
