"""One client's part of noise that several clients make together: the grid, the encoding, and what a share must be.

Every client sums its clipped gradients, rounds the sum to a grid of C/γ, γ = 2^bits, and adds a discrete Gaussian of
its own in integers. The shares are independent, and those of the honest survivors alone carry the whole noise: with
h = survivors − colluding of them each has variance (σ·(γ + √d))²/h in grid units. Rounding moves each of the d
coordinates by at most 1/2 on either side, so one example moves the rounded sum by at most γ + √d, which is what σ
multiplies (Kairouz, Liu and Steinke, arXiv 2102.06387, section 4, with deterministic rounding).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlab._validate import positive
from fedlab.errors import ConfigError, PrivacyError

BITS = 20  # of the grid: C/2^20
WORD = 64  # sums are taken modulo 2^64, as two's complement
TAILS = 50  # standard deviations of every share for which there is room: beyond lies less than 2·exp(−1250)
MOST_DISTANCE = 1e-30  # of a sum of shares from one discrete Gaussian, as a log-ratio over all coordinates


@dataclass(frozen=True)
class NoiseShare:
    """How the noise of a sum is split among the clients whose values are in it.

    Args:
        survivors: fewest clients that a sum is released with.
        colluding: clients whose shares may be known to the adversary, fewer than ``survivors``.
        bits: binary logarithm of the grid's steps per clip.
    """

    survivors: int
    colluding: int = 0
    bits: int = BITS

    def __post_init__(self) -> None:
        positive(survivors=self.survivors)
        if not 0 <= self.colluding < self.survivors:
            raise ValueError(f"colluding must be in [0, survivors = {self.survivors}), got {self.colluding}")
        if not 1 <= self.bits <= 40:
            raise ValueError(f"bits must be in [1, 40], got {self.bits}")

    @property
    def honest(self) -> int:
        """Shares that are there, and unknown to the adversary, whoever drops out."""
        return self.survivors - self.colluding

    def grid(self, clip: float) -> float:
        """Width of a grid step for the clip C: C/2^bits."""
        return clip * 2.0**-self.bits

    def sensitivity(self, dimension: int) -> float:
        """By how much one example moves the rounded sum of ``dimension`` coordinates, in grid units: 2^bits + √d."""
        positive(dimension=dimension)
        return 2.0**self.bits + math.sqrt(dimension)

    def std(self, sigma: float, dimension: int) -> float:
        """Standard deviation of one share in grid units, for the noise multiplier ``sigma`` of all together.

        Never below the exact value: what rounding may have taken away is added.
        """
        positive(sigma=sigma)
        value = sigma * self.sensitivity(dimension) / math.sqrt(self.honest)
        return value * (1 + 2.0**-50)  # six roundings of 2^-53 at most

    def encode(self, values: np.ndarray, clip: float, most: float) -> np.ndarray:
        """Real numbers on the grid.

        Args:
            values: float64, of any shape.
            clip: C.
            most: largest magnitude that a coordinate can have, n·C for a sum over n examples.

        Returns:
            int64, of the same shape.

        Raises:
            PrivacyError: a value that is no number, or larger than ``most``: it is no sum of clipped gradients.
        """
        if not np.all(np.abs(values) <= most * (1 + 1e-9)):  # False for NaN
            raise PrivacyError(
                f"a sum of clipped gradients has an entry that is no number or above n·C = {most:g}; nothing is"
                " released"
            )
        return np.rint(np.asarray(values, dtype=np.float64) / self.grid(clip)).astype(np.int64)

    def decode(self, total: np.ndarray, clip: float) -> np.ndarray:
        """A sum in grid units (int64) as float64 real numbers."""
        return np.asarray(total, dtype=np.int64).astype(np.float64) * self.grid(clip)

    def check_overflow(self, sizes: Sequence[int], sigma: float, dimension: int) -> None:
        """Refuse a sum that could leave the integers modulo 2^64.

        Privacy does not depend on it: reducing a noised integer is post-processing. What is decoded does.

        Args:
            sizes: numbers of examples of all clients that may be in the sum.
            sigma: noise multiplier of all together.
            dimension: coordinates of the signed scope.

        Raises:
            ConfigError: Σ n·2^bits + roundings + 50 standard deviations of every share reach 2^63.
        """
        spread = TAILS * self.std(sigma, dimension)
        most = sum(sizes) * 2**self.bits + len(sizes) * math.ceil(spread + 1)
        if most >= 2 ** (WORD - 1):
            raise ConfigError(
                f"privacy.sigma = {sigma:g} over {len(sizes)} clients of {sum(sizes)} examples: a sum could reach"
                f" 2^{math.log2(most):.1f} grid steps, and there is room for 2^{WORD - 1}; take less noise or fewer"
                " clients"
            )

    def check_distance(self, sigma: float, dimension: int, clients: int) -> float:
        """How far the sum of ``clients`` shares is from one discrete Gaussian of their variance, at most.

        Kairouz, Liu and Steinke (2021), theorem 9, over d coordinates: the log-ratio of the probabilities of any value
        is at most 10·d·Σ_{k=1}^{m−1} exp(−2π²s²·k/(k+1)), here with k/(k+1) ≥ 1/2 in every term.

        Returns:
            The bound; 0.0 where it is below the least float64.

        Raises:
            ConfigError: it is above 1e-30: so little noise on so coarse a grid is not accounted for.
        """
        positive(clients=clients)
        exponent = -((math.pi * self.std(sigma, dimension)) ** 2)
        logarithm = math.log(10.0 * dimension * max(clients - 1, 1)) + exponent if clients > 1 else -math.inf
        if logarithm > math.log(MOST_DISTANCE):
            raise ConfigError(
                f"privacy.sigma = {sigma:g}: {clients} shares of {self.std(sigma, dimension):.3g} grid steps do not add"
                f" up to a discrete Gaussian to within {MOST_DISTANCE:g}; take more noise"
            )
        return math.exp(max(logarithm, -745.0)) if logarithm > -745.0 else 0.0

    def terms(self, sigma: float, dimension: int) -> dict[str, Any]:
        """``shared`` of a PLAN line: see docs/ledger.md."""
        return {
            "survivors": self.survivors,
            "colluding": self.colluding,
            "dimension": dimension,
            "bits": self.bits,
            "share": self.std(sigma, dimension).hex(),
        }
