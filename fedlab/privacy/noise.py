"""Where Gaussian noise comes from.

Always drawn in float64: PyTorch's float32 normal on the CPU never exceeds 5.77 σ, which alone breaks δ = 1e-5.
``SeededNoise`` makes a simulation repeatable and is therefore no protection; ``SecureNoise`` is keyed by the operating
system and no seed reaches it.
"""

from __future__ import annotations

import os
from typing import NoReturn, Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedlab._validate import non_negative


class GaussianNoise(Protocol):
    """A source of independent N(0, std²) samples."""

    name: str

    def draw(self, shape: tuple[int, ...], std: float) -> Tensor:
        """Draw one tensor.

        Args:
            shape: of the tensor.
            std: standard deviation ≥ 0; 0 gives zeros.

        Returns:
            float64, on the CPU.

        Raises:
            ValueError: std < 0.
        """


class SeededNoise:
    """Reproducible noise from a named stream (numpy, float64, full tails)."""

    name = "seeded"

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def draw(self, shape: tuple[int, ...], std: float) -> Tensor:
        """See ``GaussianNoise.draw``."""
        non_negative(std=std)
        return torch.from_numpy(np.asarray(self._rng.standard_normal(shape) * std))


class SecureStream:
    """Uniform numbers from an AES-256-CTR key stream under a fresh key of the operating system.

    Cannot be copied, pickled or carried across a fork: two copies would give the same numbers twice, and the difference
    of two releases would be without noise.
    """

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
        self._process = os.getpid()

    def random(self, size: int) -> np.ndarray:
        """``size`` float64 in [0, 1), 53 bits each, like ``np.random.Generator.random``."""
        return (self.words(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def words(self, size: int) -> np.ndarray:
        """``size`` uniform uint64: what exact samplers draw from."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "a secure stream was carried across a fork and would repeat itself; make a new one in the new process"
            )
        return np.frombuffer(self._stream.update(bytes(8 * size)), dtype=np.uint64)

    def __reduce__(self) -> NoReturn:
        raise TypeError("secure noise cannot be copied or pickled: the copy would repeat it")


class SecureNoise(SecureStream):
    """Noise that no seed reaches: a ``SecureStream`` shaped by Box–Muller in float64, with tails up to 8.5 σ."""

    name = "secure"

    def draw(self, shape: tuple[int, ...], std: float) -> Tensor:
        """See ``GaussianNoise.draw``."""
        non_negative(std=std)
        count = int(np.prod(shape, dtype=np.int64))
        pairs = (count + 1) // 2
        uniform = 1.0 - self.random(2 * pairs)  # (0, 1], exactly: its logarithm is finite
        return torch.from_numpy(np.asarray(box_muller(uniform[:pairs], uniform[pairs:])[:count].reshape(shape) * std))


def box_muller(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """2N standard normals from uniforms u in (0, 1] and v in (0, 1] of length N each (Box and Muller, 1958)."""
    radius, angle = np.sqrt(-2.0 * np.log(u)), 2.0 * np.pi * v
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
