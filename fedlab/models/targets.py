"""Which modules get an adapter, and the refusal of adapters that would silently do less, or more, than was asked."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedlab.config.sections import LoraSection
from fedlab.errors import ConfigError
from fedlab.models.loaded import LoadedModel
from fedlab.models.quantised import shape_of

# families that peft has no default for: the projections to queries and values, or those that hold them
DEFAULTS: dict[str, tuple[str, ...]] = {
    "albert": ("query", "value"),
    "blenderbot": ("q_proj", "v_proj"),
    "cohere": ("q_proj", "v_proj"),
    "distilbert": ("q_lin", "v_lin"),
    "granite": ("q_proj", "v_proj"),
    "led": ("query", "value", "q_proj", "v_proj"),
    "longt5": ("q", "v"),
    "m2m_100": ("q_proj", "v_proj"),
    "marian": ("q_proj", "v_proj"),
    "mbart": ("q_proj", "v_proj"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
    "olmo2": ("q_proj", "v_proj"),
    "pegasus": ("q_proj", "v_proj"),
    "phi3": ("qkv_proj",),
    "qwen2_moe": ("q_proj", "v_proj"),
    "qwen3_moe": ("q_proj", "v_proj"),
    "smollm3": ("q_proj", "v_proj"),
    "starcoder2": ("q_proj", "v_proj"),
    "umt5": ("q", "v"),
}


def linear_names(base: nn.Module, head: list[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    outside = tuple(f"{name}." for name in head)
    embeddings = getattr(base, "get_output_embeddings", lambda: None)()  # over a vocabulary: frozen, often tied
    return [
        n
        for n, m in base.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not embeddings and not (n in head or n.startswith(outside))
    ]


def target_modules(base: nn.Module, lora: LoraSection, head: list[str]) -> list[str]:
    """Resolve ``lora.target_modules`` to names that each match at least one linear module, or raise ConfigError."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    linear = linear_names(base, head)
    asked = lora.target_modules
    if asked == "all-linear":  # peft leaves whole names alone whatever layers_to_transform says
        layers = lora.layers_to_transform
        return linear if layers is None else [n for n in linear if not {*n.split(".")}.isdisjoint(map(str, layers))]
    if asked == "auto":
        model_type = getattr(base.config, "model_type", "")
        defaults = {**DEFAULTS, **known}
        if model_type not in defaults:
            raise ConfigError(
                f'lora.target_modules = "auto" knows no default for {model_type!r}; name modules, or use "all-linear"'
            )
        asked = tuple(defaults[model_type])
    names = [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if not any(n == name or n.endswith(f".{name}") for n in linear):
            short = sorted({n.rpartition(".")[2] for n in linear})
            raise ConfigError(
                f"lora.target_modules: {name!r} matches no linear module{_batched(base, name)}; this model has"
                f" {', '.join(short)}"
            )
    return names


def _batched(base: nn.Module, name: str) -> str:
    """Why a name that holds a mixture's experts matches nothing."""
    for full, module in base.named_modules():
        held = any(p.ndim == 3 and len(p) > 1 for p in module.parameters(recurse=False))
        if held and (full.endswith(f".{name}") or any(leaf == name for leaf, _ in module.named_parameters())):
            return f" ({full} keeps all experts in one parameter, which is fed tokens of several examples together)"
    return ""


def check_adapted(loaded: LoadedModel, base: nn.Module, lora: LoraSection) -> None:
    """Refuse adapters that would silently do less, or more, than was asked."""
    adapted = loaded.scale
    for layer in lora.layers_to_transform or []:
        if not any(f".{layer}." in f".{name}." for name in adapted):
            raise ConfigError(f"lora.layers_to_transform: no adapted module in layer {layer}; layers count from 0")
    if (layers := lora.layers_to_transform) is not None:
        outside = [name for name in adapted if {*name.split(".")}.isdisjoint(map(str, layers))]
        if outside:
            raise ConfigError(
                f"lora.layers_to_transform = {list(layers)}, but {outside[0]} is adapted too; name modules by their"
                " last part"
            )
    owners: dict[int, list[str]] = {}
    for name, module in base.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in adapted:
        adapted_layer: Any = base.get_submodule(name)
        weight, sides = adapted_layer.base_layer.weight, shape_of(adapted_layer.base_layer)
        if len(shared := owners[id(weight)]) > 1:
            raise ConfigError(
                f"lora: {name} shares its weight with {len(shared) - 1} other module(s) (tied); adapt other modules"
            )
        if lora.rank > min(sides):
            raise ConfigError(
                f"lora.rank = {lora.rank} exceeds {name}'s smaller side, {min(sides)}; lower it, or name"
                " lora.target_modules without this one"
            )
