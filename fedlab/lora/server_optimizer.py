"""Server optimisers: the clients' mean change is a pseudo-gradient (Reddi et al., "Adaptive Federated Optimization",
arXiv 2003.00295).

Elementwise and pure: moments in, moments out, float64 inside. With lr = 1 and no momentum the change is the mean
itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pydantic
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from fedlab.lora.state import State, modules, part_of
from fedlab.lora.svd import rotation


class ServerOptimizer(pydantic.BaseModel):
    """``strategy.server``.

    ``momentum`` is FedAvgM (Hsu et al., arXiv 1909.06335), ``adam`` and ``yogi`` are Algorithm 2 of Reddi et al.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    optimizer: Literal["momentum", "adam", "yogi"] = Field(description="what the mean change is fed to, as a gradient")
    lr: float = Field(default=1.0, gt=0, description="learning rate of the server's optimiser")
    head_lr: float | None = Field(default=None, gt=0, description="the same, for the head; default: lr")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="of the first moment")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="of the second moment; adam and yogi")
    tau: float = Field(
        default=1e-3, gt=0, description="added to the root of the second moment, which starts at tau²; adam and yogi"
    )

    def lr_of(self, name: str) -> float:
        """The learning rate of a tensor, by its name."""
        return self.head_lr if self.head_lr is not None and part_of(name) == "head" else self.lr


@dataclass(frozen=True)
class Moments:
    """First and second moments of the tensors that were averaged so far, float64; empty before the first round."""

    first: State = field(default_factory=dict)
    second: State = field(default_factory=dict)


def server_step(options: ServerOptimizer, mean: Mapping[str, Tensor], before: Moments) -> tuple[State, Moments]:
    """The server's step of one round.

    momentum: m ← β₁m + Δ, change η·m. adam: m ← β₁m + (1−β₁)Δ, v ← β₂v + (1−β₂)Δ², change η·m/(√v + τ), without bias
    correction, as published. yogi: v ← v − (1−β₂)Δ²·sign(v − Δ²). Of the head η is ``head_lr``, if given.

    Args:
        options: which optimiser, η, β₁, β₂ and τ.
        mean: name → the clients' mean change Δ.
        before: the moments so far.

    Returns:
        name → change, in the dtypes of ``mean``; and the moments after it. Moments of tensors that ``mean`` lacks stay.

    Raises:
        ValueError: the mean is not finite.
    """
    first, second, change = dict(before.first), dict(before.second), {}
    for name, value in mean.items():
        delta = value.double()
        if not bool(torch.isfinite(delta).all()):
            raise ValueError(f"the mean change of {name} holds NaN or infinite values")
        m = first.get(name, torch.zeros_like(delta))
        lr = options.lr_of(name)
        if options.optimizer == "momentum":
            first[name] = options.beta1 * m + delta
            change[name] = (lr * first[name]).to(value.dtype)
            continue
        v = second.get(name, torch.full_like(delta, options.tau**2))
        first[name] = options.beta1 * m + (1 - options.beta1) * delta
        square = delta.square()
        second[name] = (
            options.beta2 * v + (1 - options.beta2) * square
            if options.optimizer == "adam"
            else v - (1 - options.beta2) * square * torch.sign(v - square)
        )
        change[name] = (lr * first[name] / (second[name].sqrt() + options.tau)).to(value.dtype)
    return change, Moments(first, second)


def rotate_moments(moments: Moments, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Moments:
    """First moments of B in the new basis when A was replaced: M ← M·A_old·A_newᵀ, so that M·A keeps what lies in both
    row spaces.

    For a re-orthonormalised A (FedSVD) of the same row space nothing is lost. A second moment is tied to its
    coordinates and has no such rule. ``before`` need not have orthonormal rows. Raises ValueError if there are second
    moments.
    """
    if moments.second:
        raise ValueError("second moments cannot be rotated; use momentum, or a strategy that keeps its basis")
    first = dict(moments.first)
    for module in modules(before):
        name = f"{module}.lora_B"
        if name in first:
            first[name] = (
                first[name] @ rotation(after[f"{module}.lora_A"].double(), before[f"{module}.lora_A"].double()).mT
            )
    assert all(part_of(name) != "lora_A" for name in first), "a strategy that rotates A does not train it"
    return Moments(first)
