"""One-line checks whose errors write themselves: ``positive(sigma=x)`` → "sigma must be > 0, got 0.0".

Each takes exactly one keyword argument, returns its value, and raises ``ValueError``.
"""

from __future__ import annotations

import math
from typing import TypeVar

N = TypeVar("N", int, float)


def _one(named: dict[str, N]) -> tuple[str, N]:
    ((name, value),) = named.items()
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, got nan")
    return name, value


def positive(**named: N) -> N:
    """Return the value if it is > 0."""
    name, value = _one(named)
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return value


def non_negative(**named: N) -> N:
    """Return the value if it is >= 0."""
    name, value = _one(named)
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return value


def probability(**named: N) -> N:
    """Return the value if it lies in [0, 1]."""
    name, value = _one(named)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value
