"""Per-example gradients of exactly the trainable tensors, for any model whose trainable layers are linear.

A linear layer y = x Wᵀ + b that sees x [N, T, in] and receives the gradient g [N, T, out] of a loss **summed** over
examples has the per-example gradients Σ_t g_t x_tᵀ [N, out, in] and Σ_t g_t [N, out] (Goodfellow, arXiv 1510.01799).
For LoRA both factors are such layers: for B, x is the r-dimensional output of A, so the outer products are small.

The trainable tensors are *not* marked as requiring a gradient. Instead each hooked layer's output becomes the leaf
where the backward pass ends, so nothing below the lowest trained layer, and no gradient summed over examples, is ever
computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn

from fedlab.errors import ConfigError
from fedlab.models.loaded import LoadedModel
from fedlab.models.watch import watching


class PerExampleGradients:
    """Context manager: after ``loss.backward()``, ``take()`` gives {State name: [N, *shape]} for one batch of N
    examples.

    Formal guarantee: row i is the gradient of example i's loss alone, provided the model treats examples independently
    (no batch normalisation) and the loss is a sum over examples. Tests compare it with a loop over single examples in
    float64.
    """

    def __init__(self, model: LoadedModel, names: Iterable[str]) -> None:
        self._layers: dict[nn.Linear, tuple[str | None, str | None]] = {}  # layer → (name of its weight, of its bias)
        for name in names:
            owner, parameter = model.owners[name], model.parameters[name]
            if not isinstance(owner, nn.Linear):
                raise ConfigError(
                    f"{name} belongs to a {type(owner).__name__}: per-example gradients are known for linear layers"
                    ' only; set train.head = "freeze", or privacy.unit = "none"'
                )
            weight, bias = self._layers.get(owner, (None, None))
            self._layers[owner] = (name, bias) if parameter is owner.weight else (weight, name)
        self._gradients: dict[str, Tensor] = {}
        self._watch = ExitStack()

    def __enter__(self) -> PerExampleGradients:
        self._watch.enter_context(watching({layer: layer for layer in self._layers}, self._forward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.close()

    def take(self) -> dict[str, Tensor]:
        """The gradients of the last backward pass; raises if a trained layer took no part in it (a silent no-op)."""
        gradients, self._gradients = self._gradients, {}
        wanted = {name for pair in self._layers.values() for name in pair if name is not None}
        if missing := wanted - gradients.keys():
            raise RuntimeError(
                f"no gradient reached {sorted(missing)[0]}: the model does not use this layer; adapt other modules"
            )
        return gradients

    def _forward(self, layer: nn.Linear, inputs: Tensor | None, output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        assert inputs is not None
        x = inputs.detach()
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(lambda gradient: self._backward(layer, x, gradient))

    def _backward(self, layer: nn.Linear, x: Tensor, gradient: Tensor) -> None:
        weight, bias = self._layers[layer]
        count = x.shape[0]
        x, gradient = x.reshape(count, -1, x.shape[-1]), gradient.reshape(count, -1, gradient.shape[-1])
        if weight is not None:
            self._add(weight, torch.bmm(gradient.transpose(1, 2), x.to(gradient.dtype)))  # [N, out, in]
        if bias is not None:
            self._add(bias, gradient.sum(1))  # [N, out]

    def _add(self, name: str, gradient: Tensor) -> None:
        """Sum over the uses of a layer that runs more than once in a forward pass."""
        self._gradients[name] = self._gradients[name] + gradient if name in self._gradients else gradient
