"""The process's one model: a frozen base and one adapter, whose tensors are overwritten for each client."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fedlab.lora.state import BASIS, RESIDUAL, UNTRAINED, State, digest, outer_b, part_of, residual_of
from fedlab.lora.svd import principal_rows
from fedlab.models.blocks import stepping_over
from fedlab.models.quantised import dense, kind_of
from fedlab.objectives.base import Objective

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PEFT_PREFIX = "base_model.model."


class LoadedModel:
    """A frozen base with one adapter whose tensors are overwritten per client, and what it is trained for.

    Made by ``build``; one per process.
    """

    def __init__(
        self, peft_model: PeftModel, tokenizer: PreTrainedTokenizerBase, device: torch.device, objective: Objective
    ) -> None:
        self.module, self.tokenizer, self.device, self.objective = peft_model, tokenizer, device, objective
        self.parameters: dict[str, nn.Parameter] = {}  # State name → the tensor inside the model
        self.owners: dict[str, nn.Module] = {}  # State name → the module that multiplies with it
        for owner_name, owner in peft_model.named_modules():
            for leaf, parameter in owner.named_parameters(recurse=False):
                if (name := state_name(f"{owner_name}.{leaf}")) is not None:
                    self.parameters[name], self.owners[name] = parameter, owner
        self.scale: dict[str, float] = {
            name.removeprefix(PEFT_PREFIX): float(layer.scaling["default"])
            for name, layer in peft_model.named_modules()
            if hasattr(layer, "lora_A") and hasattr(layer, "scaling")
        }
        self.lower: tuple[list[nn.Module], int] = (
            [],
            -1,
        )  # blocks that a batch with ``hidden`` steps over, and their output's form
        self.told_padding = False  # whether the base's own configuration names another padding token than the tokenizer
        self.verdicts: dict[tuple[str, tuple[str, ...]], object] = {}  # of ``fedlab.train.check_gradients``
        self._pristine: dict[str, Tensor] = {}  # module → its weight before any residual was folded in
        self._folded = digest({})
        self.module.requires_grad_(False)
        self.module.eval()

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Overwrite every adapter and head tensor and the residual. All names must be there, so that nothing of another
        client stays.

        An adapter may have another rank than before; B is written out of the coordinates of a ``basis_U``.
        """
        own = {name for name in state if part_of(name) not in UNTRAINED}
        if missing := self.parameters.keys() ^ own:
            raise ValueError(f"state and model differ in {len(missing)} names, for example {sorted(missing)[0]!r}")
        for name in sorted(own):
            module, _, part = name.rpartition(".")
            self._overwrite(
                name, outer_b(state, module) if part == "lora_B" and f"{module}.{BASIS}" in state else state[name]
            )
        self._fold({name: value for name, value in state.items() if part_of(name) in RESIDUAL})

    def _overwrite(self, name: str, value: Tensor) -> None:
        parameter = self.parameters[name]
        if parameter.shape == value.shape:
            parameter.copy_(value)
            return
        if part_of(name) == "head":
            raise ValueError(f"{name} has shape {tuple(value.shape)}, want {tuple(parameter.shape)}")
        owner: Any = self.owners[name]
        owner.weight = nn.Parameter(value.to(parameter.device, parameter.dtype, copy=True), requires_grad=False)
        owner.out_features, owner.in_features = value.shape
        self.parameters[name] = owner.weight

    def _fold(self, residual: State) -> None:
        """Base weights = pristine + s·residual.

        Done once for all clients that carry the same residual, which is told by its bytes.
        """
        if (name := digest(residual)) == self._folded:
            return
        for module, pristine in self._pristine.items():
            self._weight(module).copy_(pristine)
        for module in sorted({n.rpartition(".")[0] for n in residual}):
            if module not in self.scale:
                raise ValueError(f"residual of {module!r}, which has no adapter")
            factors = residual_of(residual, module)
            assert factors is not None
            if (kind := kind_of(self._base_layer(module))) is not None:
                raise ValueError(f"residual of {module!r}, whose weight is quantised ({kind}) and cannot take it")
            weight = self._weight(module)
            if module not in self._pristine:
                self._pristine[module] = weight.clone()
            B, A = (f.to(self.device, torch.float32) for f in factors)
            delta = self.scale[module] * (B @ A)
            pristine = self._pristine[module]
            weight.copy_(pristine.float() + (delta.mT if self.transposed(module) else delta))
        self._folded = name

    def _base_layer(self, module: str) -> nn.Module:
        layer: nn.Module = cast(Any, self.layer(module)).base_layer
        return layer

    def _weight(self, module: str) -> Tensor:
        weight: Tensor = cast(Any, self._base_layer(module)).weight
        return weight

    def transposed(self, module: str) -> bool:
        """GPT-2's Conv1D keeps its weight as [in, out]."""
        return bool(getattr(self.layer(module), "fan_in_fan_out", False))

    def layer(self, module: str) -> nn.Module:
        """The peft layer of an adapted module."""
        layer: nn.Module = self.module.get_submodule(PEFT_PREFIX + module)
        return layer

    def state(self) -> State:
        """A copy of every adapter and head tensor on the CPU, float32 unless the model is float64."""
        return {
            name: p.detach().to("cpu", torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    def pristine(self, module: str) -> Tensor:
        """A module's weight [m, n] as it was loaded, without any residual, dequantised; float64 on the CPU."""
        own = self._pristine[module] if module in self._pristine else dense(self._base_layer(module))
        weight = own.detach().to("cpu", torch.float64)
        return weight.mT if self.transposed(module) else weight

    def leading_inputs(self, module: str, rank: int) -> Tensor:
        """The ``rank`` leading right singular vectors of a module's pristine weight, as orthonormal rows [rank, n],
        signs fixed.
        """
        weight = self.pristine(module)
        return principal_rows(weight.mT @ weight, rank)[0].float()

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """module → its peft layer, for every adapted module, in the order of their names."""
        return {name: self.layer(name) for name in sorted(self.scale)}

    def outputs(self, batch: dict[str, Tensor], **options: Any) -> Any:
        """What the base model returns for one padded batch; it goes on from ``hidden`` if that is in the batch.

        ``options`` go to the forward pass as they are.
        """
        inputs = {name: value.to(self.device) for name, value in self.objective.inputs(self, batch).items()}
        blocks, extra = self.lower
        with stepping_over(blocks, batch["hidden"].to(self.device), extra) if "hidden" in batch else nullcontext():
            return self.module(**inputs, **options)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The objective's logits of one padded batch, [N, ...], float32."""
        return self.objective.logits(self, batch)


def state_name(parameter_name: str) -> str | None:
    """peft's parameter name → ``<module>.lora_A``, ``<module>.lora_B`` or ``head.<name>``; None for the frozen base."""
    name = parameter_name.removeprefix(PEFT_PREFIX)
    for part in ("lora_A", "lora_B"):
        if name.endswith(f".{part}.default.weight"):
            return name.removesuffix(".default.weight")
    return f"head.{name.replace('.modules_to_save.default', '')}" if ".modules_to_save.default" in name else None
