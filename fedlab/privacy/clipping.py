"""Clip per-example gradients by one joint norm.

Formal guarantee: the returned sum changes by at most C in L2 norm when one example is added or removed, whatever its
gradient holds. A NaN or infinite gradient contributes nothing: clipping by ``min(1, C/norm)`` alone would let its other
coordinates through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlab._validate import positive

MARGIN = 1 - 2.0**-20  # float32 rounding of norm and product must not lift a clipped norm above C


def joint_norms(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm per example over all tensors together.

    Args:
        gradients: one or more tensors [N, *shape]; squares are added in this order.

    Returns:
        [N], float64; NaN or infinite where any entry of the example is.
    """
    squares = [gradient.double().flatten(1).square().sum(1) for gradient in gradients]
    return torch.stack(squares).sum(0).sqrt()


def clip_factors(norms: Tensor, clip: float) -> Tensor:
    """The factor that brings each example's norm down to C.

    Args:
        norms: [N], before clipping.
        clip: C > 0.

    Returns:
        [N], float64: 1 where the norm is at most C·MARGIN, C·MARGIN/norm above, 0 where it is NaN or infinite.

    Raises:
        ValueError: C is not > 0.
    """
    positive(clip=clip)
    factors = (clip * MARGIN / norms.double().clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clipped_sum(gradients: Mapping[str, Tensor], clip: float) -> tuple[dict[str, Tensor], Tensor]:
    """Sum over examples of the clipped gradients, and the norms before clipping.

    Args:
        gradients: name → [N, *shape]; the norm of an example is taken over **all** tensors together, so the
            sensitivity is C and not C·√(number of tensors).
        clip: C > 0.

    Returns:
        name → [*shape] in float64, and norms [N] in float64. N may be 0: the sum is then zero.

    Raises:
        ValueError: no gradients, tensors that disagree on N, or C not > 0.
    """
    if not gradients:
        raise ValueError("no gradients to clip")
    counts = {name: gradient.shape[0] for name, gradient in gradients.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"gradients disagree on the number of examples: {counts}")
    norms = joint_norms(gradients.values())
    factors = clip_factors(norms, clip)
    usable = factors > 0
    total = {}
    for name, gradient in gradients.items():
        # 0·NaN is NaN: a dropped example is left out, not scaled.
        finite = gradient if bool(usable.all()) else gradient[usable]
        total[name] = torch.einsum("n,n...->...", factors[usable], finite.double())
    return total, norms
