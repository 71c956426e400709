"""Head only: the adapter stays at zero and only the task head is trained and averaged.

The floor that every adapter has to beat, at the same privacy.
"""

from __future__ import annotations

from typing import ClassVar

from strategies.base import Strategy


class HeadOnly(Strategy):
    """head_t+1 = Σ p_k head_k."""

    linear: ClassVar[bool] = True
    effective: ClassVar[str] = "unchanged"
    trains: ClassVar[frozenset[str]] = frozenset()
