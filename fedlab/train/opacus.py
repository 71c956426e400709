"""Per-example gradients by Opacus' hooks: the reference that ``train.gradients = "opacus"`` selects.

Used as ``PerExampleGradients`` is.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor

from fedlab.models.loaded import LoadedModel


class OpacusGradients:
    """Context manager: after ``loss.backward()`` of a loss summed over examples, ``take()`` gives {State name: [N,
    *shape]}.
    """

    def __init__(self, model: LoadedModel, names: Iterable[str]) -> None:
        self._model, self._names = model, sorted(names)
        self._wrapped: Any = None

    def __enter__(self) -> OpacusGradients:
        from opacus.grad_sample import GradSampleModule  # here: at its import it sets up logging for everybody

        if self._names:
            for name in self._names:
                self._model.parameters[name].requires_grad_()
                self._model.owners[
                    name
                ].train()  # Opacus looks at layers in training mode only; the rest keeps its dropout off
            self._wrapped = GradSampleModule(self._model.module, batch_first=True, loss_reduction="sum", strict=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wrapped is not None:
            self._wrapped.remove_hooks()
        for name in self._names:
            parameter: Any = self._model.parameters[name]
            parameter.requires_grad_(False)
            parameter.grad = parameter.grad_sample = None
            self._model.owners[name].eval()

    def take(self) -> dict[str, Tensor]:
        """The gradients of the last backward pass; raises if a trained layer took no part in it (a silent no-op)."""
        found: dict[str, Tensor] = {}
        for name in self._names:
            parameter: Any = self._model.parameters[name]
            if parameter.grad_sample is None:
                raise RuntimeError(
                    f"no gradient reached {name}: the model does not use this layer; adapt other modules"
                )
            found[name] = parameter.grad_sample
            parameter.grad = parameter.grad_sample = None
        return found
