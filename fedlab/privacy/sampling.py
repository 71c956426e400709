"""How a step's batch is drawn.

Only ``poisson_batch`` gives Poisson amplification; see ``fedlab.privacy.accounting``.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fedlab._validate import positive, probability


class Uniform(Protocol):
    """A source of uniform numbers: a numpy Generator, or
    ``noise.SecureStream`` where nobody may foresee the batches.
    """

    def random(self, size: int, /) -> np.ndarray:
        """``size`` float64 in [0, 1)."""


def poisson_batch(n: int, q: float, rng: Uniform) -> np.ndarray:
    """Sorted indices of a batch that holds each of n examples with probability q, independently. It may be empty."""
    positive(n=n)
    probability(q=q)
    return np.flatnonzero(rng.random(n) < q)


def fixed_batches(n: int, batch_size: int, steps: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of exactly min(batch_size, n) distinct examples from reshuffled passes over the data.

    For training without DP only.
    """
    positive(n=n)
    positive(batch_size=batch_size)
    size = min(batch_size, n)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        order = rng.permutation(n)
        batches += [np.sort(order[i : i + size]) for i in range(0, n - size + 1, size)]
    return batches[:steps]
