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
    """A batch that holds each example with probability q, independently.

    Args:
        n: examples, > 0.
        q: probability in [0, 1].
        rng: source of n uniform numbers.

    Returns:
        Positions in ascending order, 0 to n − 1; possibly none.
    """
    positive(n=n)
    probability(q=q)
    return np.flatnonzero(rng.random(n) < q)


def fixed_batches(n: int, batch_size: int, steps: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Batches of exactly min(batch_size, n) distinct examples from reshuffled passes over the data; without DP only.

    Args:
        n: examples, > 0.
        batch_size: > 0.
        steps: number of batches.
        rng: shuffles every pass.

    Returns:
        Positions in ascending order, one array per step.
    """
    positive(n=n)
    positive(batch_size=batch_size)
    size = min(batch_size, n)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        order = rng.permutation(n)
        batches += [np.sort(order[i : i + size]) for i in range(0, n - size + 1, size)]
    return batches[:steps]
