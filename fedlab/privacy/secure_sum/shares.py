"""Shamir's secret sharing (1979) of 16 bytes over the integers modulo the prime 2¹²⁷ − 1.

A polynomial of degree threshold − 1 has the secret at 0 and uniform coefficients; share i is its value at i. Any
``threshold`` shares give the secret, fewer say nothing of it. Libraries share in GF(2¹²⁸) with Python loops over bits:
for a thousand clients of 114 neighbours each that takes minutes a round, here it is seconds
(``simulations/benchmarks/secure_sum.py``).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

PRIME = 2**127 - 1
BYTES = 16


def new_secret() -> bytes:
    """A fresh secret: 16 bytes, uniform below ``PRIME``."""
    return secrets.randbelow(PRIME).to_bytes(BYTES, "big")


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares 1 … ``count`` of a secret, 16 bytes each.

    Args:
        secret: of ``new_secret``.
        threshold: shares that give it.
        count: of shares.

    Raises:
        ValueError: a threshold outside [1, count], or no such secret.
    """
    if not 1 <= threshold <= count:
        raise ValueError(f"threshold must be within [1, {count}] (the number of shares), got {threshold}")
    coefficients = [_number(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_at(coefficients, x).to_bytes(BYTES, "big") for x in range(1, count + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of which these are shares (number → share), if they are as many as its threshold.

    Raises ValueError for no shares, a number below 1, or what is no share.
    """
    if not shares or min(shares) < 1:
        raise ValueError(f"shares are numbered from 1, got {sorted(shares)}")
    numbers = tuple(sorted(shares))
    weights = _weights(numbers)
    total = sum(weight * _number(shares[x]) for x, weight in zip(numbers, weights, strict=True))
    return (total % PRIME).to_bytes(BYTES, "big")


def _at(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):  # Horner
        value = (value * x + coefficient) % PRIME
    return value


@lru_cache(maxsize=4096)
def _weights(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights at 0 of values at these places."""
    weights = []
    for x in numbers:
        above, below = 1, 1
        for other in numbers:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)


def _number(value: bytes) -> int:
    number = int.from_bytes(value, "big")
    if len(value) != BYTES or number >= PRIME:
        raise ValueError(f"want {BYTES} bytes below 2^127 - 1, got {len(value)} bytes")
    return number
