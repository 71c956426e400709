"""A base model without its weights: what can be known of an adapter's place before gigabytes are read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlab.config import RunConfig
from fedlab.config.sections import LoraSection, ModelSection
from fedlab.errors import ConfigError
from fedlab.models.encoder import SentenceClassifier, pooling_of
from fedlab.models.hub import locate
from fedlab.models.loading import quiet_seeded
from fedlab.models.targets import linear_names, target_modules
from fedlab.objectives import objective_class


def check_outline(config: RunConfig) -> None:
    """Raise ConfigError that lists whatever ``[lora]`` asks of this model that it does not have."""
    outline = _outline(config.model, config.objective.name)
    if outline is not None and (problems := list(_problems(outline[0], config.lora, outline[1]))):
        raise ConfigError("\n".join(problems))


def _problems(base: nn.Module, lora: LoraSection, head: list[str]) -> Iterator[str]:
    try:
        names = target_modules(base, lora, head)
    except ConfigError as error:
        yield str(error)
        names = linear_names(base, head)
    adapted = [n for n in linear_names(base, head) if any(n == name or n.endswith(f".{name}") for name in names)]
    for layer in lora.layers_to_transform or ():
        if not any(f".{layer}." in f".{name}." for name in adapted):
            yield f"lora.layers_to_transform: no adapted module in layer {layer}; layers count from 0"
    if lora.layers_to_transform is not None:
        adapted = [name for name in adapted if not {*name.split(".")}.isdisjoint(map(str, lora.layers_to_transform))]
    for name in adapted:
        weight: Any = base.get_submodule(name).weight
        if lora.rank > min(weight.shape):
            yield f"lora.rank = {lora.rank} exceeds {name}'s smaller side, {min(weight.shape)}"
            return


@lru_cache(maxsize=1)
def _outline(model: ModelSection, objective: str) -> tuple[nn.Module, list[str]] | None:
    """The base on no device, and the names of what is not its body: there its head will be.

    None where it cannot be made without its weights.
    """
    import transformers

    location = locate(model)
    kind = objective_class(objective)
    try:
        with quiet_seeded(0), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(location, revision=model.revision)
            pooling = pooling_of(location, model.revision) if kind.task_type == "SEQ_CLS" else None
            if pooling is not None:
                return SentenceClassifier(transformers.AutoModel.from_config(config), pooling, 2), ["classifier"]
            base: nn.Module = getattr(transformers, kind.auto_class).from_config(config)
    except Exception as error:  # a model that cannot be made without its weights is looked at when it is loaded
        if isinstance(error, OSError | ValueError) and Path(location).is_dir():
            raise ConfigError(f"model.name = {model.name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
        return None
    body = getattr(base, "base_model_prefix", "")
    if kind.task_type != "SEQ_CLS" or not hasattr(base, body):
        return base, []
    return base, [name for name, _ in base.named_children() if name != body]
