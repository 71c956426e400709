"""FedSVD (arXiv 2505.12805): clients train B; the server averages B and re-orthogonalises A by the SVD of B·A.

The refactorisation keeps the product, so it costs no accuracy and, being post-processing of noised updates, no privacy. Under plain
or momentum SGD it is a change of basis: the run equals FFA-LoRA with orthonormal A (docs/fedsvd.md, tests/lora/test_fedsvd_equivalence.py).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedlab.lora.state import State
from fedlab.lora.svd import refactorize_state
from strategies.base import LoraStrategy, NoOptions


class FedSVDOptions(NoOptions):
    """[strategy] keys of FedSVD."""

    period: int = Field(default=1, gt=0, description="refactorise after every so many rounds")
    warmup: int = Field(default=0, ge=0, description="rounds before the first refactorisation")


class FedSVD(LoraStrategy):
    """B_t+1 = U_r Σ_r and A_t+1 = V_rᵀ of (Σ p_k B_k)·A_t (Eq. 7)."""

    trains: ClassVar[frozenset[str]] = frozenset({"lora_B"})
    Options: ClassVar[type[NoOptions]] = FedSVDOptions

    def aggregate(self, state: State, updates: dict[str, State], weights: dict[str, float], round_number: int) -> State:
        averaged = super().aggregate(state, updates, weights, round_number)
        options = self.options
        assert isinstance(options, FedSVDOptions)
        due = round_number > options.warmup and round_number % options.period == 0
        return refactorize_state(averaged) if due else averaged
