"""A base whose frozen linear layers are kept in few bits (``model.quantize``), and what its weights stand for.

``nf4`` is bitsandbytes' 4-bit normal float (Dettmers et al. 2023, arXiv 2305.14314); ``int8`` is torchao's weight-only
quantisation. bitsandbytes' own 8 bits (LLM.int8(), arXiv 2208.07339) are not used: it looks for outlier columns over a
whole batch, so that what one example gives would depend on the others, which the clip of DP-SGD does not allow.

The layers over the vocabulary and the embeddings stay as they are, and so does GPT-2's ``Conv1D`` under ``int8``. Both
kinds compute a layer's product from the numbers its weight stands for; adapters are float32 as always.
"""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlab.config.sections import ModelSection
from fedlab.errors import ConfigError

LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao"}  # kind → what makes and multiplies such weights
KEPT_BY = {"Params4bit": "nf4", "Int8Params": "LLM.int8()"}  # bitsandbytes' types of weights


def check_quantiser(model: ModelSection) -> None:
    """Raise ConfigError where the package that a kind needs is not installed; nothing is imported."""
    library = LIBRARIES.get(model.quantize)
    if library is not None and importlib.util.find_spec(library) is None:
        raise ConfigError(
            f'model.quantize = "{model.quantize}" needs the package {library}, which is not installed: pip install'
            f' {library}, or set model.quantize = "none"'
        )


def quantisation(model: ModelSection, dtype: torch.dtype) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a base of this kind that computes in ``dtype``; {} for "none".

    Raises ConfigError where its package is not installed.
    """
    check_quantiser(model)
    if model.quantize == "none":
        return {}
    import transformers

    if model.quantize == "nf4":
        made: Any = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        made = transformers.TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    return {"quantization_config": made}


def kind_of(layer: nn.Module) -> str | None:
    """What a layer's weight is kept as; None for plain numbers."""
    weight = getattr(layer, "weight", None)
    if weight is None:
        return None
    if type(weight).__module__.startswith("torchao."):
        return "torchao"
    return KEPT_BY.get(type(weight).__name__)


def dense(layer: nn.Module) -> Tensor:
    """The numbers that a layer's weight stands for; the weight itself where it is not quantised."""
    if kind_of(layer) is None:
        return cast(Tensor, layer.weight)
    from peft.utils.integrations import dequantize_module_weight

    return cast(Tensor, dequantize_module_weight(layer)).detach()


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Sides of a layer's weight as it multiplies; 4-bit weights are packed."""
    if kind_of(layer) is None:
        m, n = cast(Tensor, layer.weight).shape
        return m, n
    sizes = cast(Any, layer)
    return sizes.out_features, sizes.in_features


def stored(tensor: Tensor) -> int:
    """Bytes that a parameter takes, with the scales of a quantised one."""
    state = getattr(tensor, "quant_state", None)
    return sum(part.nbytes for part in parts_of(tensor)) + (state.absmax.nbytes if state is not None else 0)


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that one is made of: itself, but for torchao's, which are a kind of record."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = cast(Any, tensor).__tensor_flatten__()
    values = (getattr(tensor, name) for name in names)
    return [part for value in values if isinstance(value, Tensor) for part in parts_of(value)]


def require_plain(base: nn.Module, model: ModelSection) -> None:
    """Raise ConfigError for a checkpoint that is quantised already, unless that was asked for."""
    kind = next((found for layer in base.modules() if (found := kind_of(layer)) is not None), None)
    if kind is not None and model.quantize == "none":
        raise ConfigError(
            f"model.name = {model.name!r}: its checkpoint is quantised already ({kind}); take the one it was made from,"
            ' with model.quantize = "nf4" or "int8"'
        )
