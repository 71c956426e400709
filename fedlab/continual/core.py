"""W + Lᵀ·C·R: a linear layer that learns in core coordinates of a subspace, whatever the optimiser does.

L [p, m] and R [q, n] are orthonormal rows, fixed for a task: bases of what earlier tasks left free. Then

- every C gives a permitted change: orthogonality holds under AdamW, noise and quantisation, where projected gradients
  leak (16 to 44 %);
- ‖Lᵀ·C·R‖ = ‖C‖ (Frobenius): clipping C is clipping ΔW;
- the mean of several C is the mean of their ΔW: federated averaging is exact, which it is not for factors;
- with L and R from the singular vectors of W it reaches exactly what OSFT's low factors U_l, S_l, V_l reach.

A module with buffers and one parameter, and no hooks: ``copy.deepcopy``, pickle and Ray keep it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlab.continual.subspace import check_orthonormal
from fedlab.errors import ConfigError


class CoreLinear(nn.Module):
    """A frozen linear layer plus Lᵀ·C·R, C [p, q] trained from zero; ``left`` None is the identity (C [m, q])."""

    weight: Tensor
    bias: Tensor | None
    left: Tensor | None
    right: Tensor

    def __init__(self, base: nn.Linear, left: Tensor | None, right: Tensor) -> None:
        super().__init__()
        m, n = base.weight.shape
        if right.shape[-1] != n or (left is not None and left.shape[-1] != m):
            raise ValueError(
                f"bases of {right.shape[-1]} inputs and {m if left is None else left.shape[-1]} outputs for a {m}×{n}"
                " layer"
            )
        check_orthonormal(right, "right")
        if left is not None:
            check_orthonormal(left, "left")
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        self.register_buffer("weight", base.weight.detach().clone())
        self.register_buffer("bias", None if base.bias is None else base.bias.detach().clone())
        self.register_buffer("left", None if left is None else left.detach().to(wide).clone())
        self.register_buffer("right", right.detach().to(wide).clone())
        self.core = nn.Parameter(
            torch.zeros(m if left is None else len(left), len(right), dtype=wide, device=base.weight.device)
        )

    def forward(self, x: Tensor) -> Tensor:
        """y [..., m] of x [..., n]; never forms ΔW."""
        change = nn.functional.linear(nn.functional.linear(x.to(self.right.dtype), self.right), self.core)
        if self.left is not None:
            change = change @ self.left
        return nn.functional.linear(x, self.weight, self.bias) + change.to(self.weight.dtype)

    @property
    def delta(self) -> Tensor:
        """ΔW = Lᵀ·C·R [m, n]."""
        inner = self.core @ self.right
        return inner if self.left is None else self.left.mT @ inner

    def merged(self) -> nn.Linear:
        """A plain layer with W + ΔW: what the next task starts from."""
        m, n = self.weight.shape
        layer = nn.Linear(n, m, bias=self.bias is not None, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.weight + self.delta)
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer


def wrap(model: nn.Module, bases: Mapping[str, tuple[Tensor | None, Tensor]]) -> dict[str, CoreLinear]:
    """Freeze ``model`` and put a ``CoreLinear`` in the place of every named linear layer; name → layer.

    Raises ConfigError for a name that is no linear layer, and for a weight that another module uses too (it would
    change silently).
    """
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name in bases:
        layer = _get(model, name)
        if not isinstance(layer, nn.Linear):
            raise ConfigError(f"{name!r} is a {type(layer).__name__}, want a linear layer")
        if len(users[id(layer.weight)]) > 1:
            raise ConfigError(
                f"{name!r} shares its weight with {', '.join(users[id(layer.weight)][1:])} (tied); leave it out"
            )
    model.requires_grad_(False)
    found = {}
    for name, (left, right) in bases.items():
        parent, _, leaf = name.rpartition(".")
        found[name] = CoreLinear(cast(nn.Linear, _get(model, name)), left, right)
        setattr(model.get_submodule(parent), leaf, found[name])
    return found


def _get(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"{name!r} is no module of this model") from None
