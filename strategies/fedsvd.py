"""FedSVD (arXiv 2505.12805): clients train B; the server averages B and re-orthogonalises A by the SVD of B·A.

The refactorisation keeps the product, so it costs no accuracy and, being post-processing of noised updates, no privacy.
Under plain or momentum SGD it is a change of basis: the run equals FFA-LoRA with orthonormal A (docs/fedsvd.md,
tests/lora/test_fedsvd_equivalence.py).

``refresh`` makes it more than that: every so many rounds the directions that carry least are folded into a residual of
the base, which changes no effective weight, and new directions are opened in their place with B = 0. The row space then
moves. That too is post-processing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.server_optimizer import Moments, rotate_moments
from fedlab.lora.state import State, modules, part_of
from fedlab.lora.subspace import open_rows
from fedlab.lora.svd import refactorize_state
from fedlab.seeds import torch_stream
from strategies.base import Round, ServerState, Strategy, Updates, Weights
from strategies.folding import fold, require_float32
from strategies.moments import moments_of, with_moments
from strategies.options import MeanOptions, NoOptions


class Refresh(NoOptions):
    """``strategy.refresh``: a row space that moves."""

    every: int = Field(gt=0, description="rounds between two refreshes")
    keep: int = Field(
        default=0, ge=0, description="directions with the largest singular values that stay in the adapter"
    )
    source: Literal["random", "weights"] = Field(
        default="random", description="of new directions; weights: the base's next singular vectors"
    )


class FedSVDOptions(MeanOptions):
    """[strategy] keys of FedSVD."""

    period: int = Field(default=1, gt=0, description="refactorise after every so many rounds")
    warmup: int = Field(default=0, ge=0, description="rounds before the first refactorisation")
    refresh: Refresh | None = None

    @model_validator(mode="after")
    def _together(self) -> FedSVDOptions:
        if self.refresh is not None and self.refresh.every % self.period:
            raise ValueError(
                f"refresh.every = {self.refresh.every} must be a multiple of period = {self.period}: it needs sorted"
                " directions"
            )
        return self


class FedSVD(Strategy):
    """B_t+1 = U_r Σ_r and A_t+1 = V_rᵀ of (Σ p_k B_k)·A_t (Eq. 7)."""

    linear: ClassVar[bool] = True
    effective: ClassVar[str] = "mean of products, exactly"
    trains: ClassVar[frozenset[str]] = frozenset({"lora_B"})
    Options: ClassVar[type[FedSVDOptions]] = FedSVDOptions
    options: FedSVDOptions

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """A residual needs a base that keeps it, and a refresh something to refresh."""
        super().check(config)
        options = cls.Options(**config.strategy.options)
        if options.server is not None and options.server.optimizer != "momentum":
            raise ConfigError(
                f'strategy.server.optimizer = "{options.server.optimizer}" with fedsvd: its second moments have no'
                ' meaning in the next round\'s basis; use "momentum", which is rotated with it, or ffa'
            )
        if (refresh := options.refresh) is not None:
            require_float32(config)
            if refresh.keep >= config.lora.rank:
                raise ConfigError(
                    f"strategy.refresh.keep = {refresh.keep} leaves nothing to refresh of lora.rank ="
                    f" {config.lora.rank}"
                )

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        averaged, server_state = super().aggregate(state, server_state, updates, weights, round)
        options = self.options
        if round.number <= options.warmup or round.number % options.period:
            return averaged, server_state
        rotated = refactorize_state(averaged)
        moments = rotate_moments(moments_of(server_state), averaged, rotated)
        if options.refresh is not None and round.number % options.refresh.every == 0:
            rotated = self._refresh(rotated, options.refresh, round.number)
            moments = without_directions(moments, options.refresh.keep)
        return rotated, with_moments(server_state, moments)

    def _refresh(self, state: State, refresh: Refresh, round_number: int) -> State:
        """Fold all but the ``keep`` largest directions, open as many new ones. No effective weight changes."""
        for module in modules(state):
            B, A = state[f"{module}.lora_B"], state[f"{module}.lora_A"]
            keep, opened = refresh.keep, len(A) - refresh.keep
            state = fold(state, module, (B[:, keep:].double(), A[keep:].double()))
            new = open_rows(A[:keep], self._candidates(refresh, module, A, opened, round_number), opened)
            state[f"{module}.lora_A"] = torch.cat([A[:keep], new])
            state[f"{module}.lora_B"] = torch.cat([B[:, :keep], torch.zeros_like(B[:, keep:])], 1)
        return state

    def _candidates(
        self, refresh: Refresh, module: str, A: torch.Tensor, count: int, round_number: int
    ) -> torch.Tensor:
        """Twice as many rows as are needed: Gaussian, or the base's right singular vectors that come next."""
        n = A.shape[1]
        if refresh.source == "weights":
            taken = len(A) + (round_number // refresh.every - 1) * count
            rows = self.base.leading_inputs(module, n)
            return rows.roll(-(taken % n), 0)[: min(n, 2 * count + len(A))]
        generator = torch_stream(self.config.sampling_seed, "refresh", module, round_number)
        return torch.randn(min(n, 2 * count), n, generator=generator, dtype=torch.float64)


def without_directions(moments: Moments, keep: int) -> Moments:
    """First moments of B that are zero in all but its first ``keep`` directions: the others are no longer trained."""
    first = dict(moments.first)
    for name, value in first.items():
        if part_of(name) == "lora_B":
            first[name] = torch.cat([value[:, :keep], torch.zeros_like(value[:, keep:])], 1)
    return Moments(first, moments.second)
