"""FFA-LoRA (arXiv 2403.12313): A is frozen at its start, only B is trained and averaged, so averaging is exact.

With ``lora.init_a = "orthonormal"`` this is the baseline to compare FedSVD with (see docs/fedsvd.md).
"""

from __future__ import annotations

from typing import ClassVar

from strategies.base import Strategy


class FFALora(Strategy):
    """B_t+1 = Σ p_k B_k with one A for ever: B_t+1·A = Σ p_k (B_k·A)."""

    linear: ClassVar[bool] = True
    effective: ClassVar[str] = "mean of products, exactly"
    trains: ClassVar[frozenset[str]] = frozenset({"lora_B"})
