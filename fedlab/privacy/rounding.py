"""ε as it is shown to people: rounded up, never down, since a smaller number promises more."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal


def rounded_up(value: float, digits: int = 4) -> str:
    """Decimal form with so many digits after the point that is never below the value; ``inf`` for infinity."""
    if not math.isfinite(value):
        return str(value)
    return f"{Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING):f}"
