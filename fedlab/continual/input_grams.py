"""What a task's texts put into the adapted layers of a model: their clipped Gram matrices, one per distinct input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedlab.continual.sketch import clipped_grams
from fedlab.errors import ConfigError
from fedlab.models.loaded import PEFT_PREFIX, LoadedModel

if TYPE_CHECKING:
    from fedlab.data import FederatedData


@contextmanager
def _watching(model: LoadedModel, seen: dict[str, Tensor]) -> Iterator[None]:
    """While open, every adapted module leaves its last input in ``seen``."""

    def hook(module: str) -> Any:
        def note(_: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[module] = inputs[0]

        return note

    handles = [
        model.module.get_submodule(PEFT_PREFIX + name).register_forward_pre_hook(hook(name))
        for name in sorted(model.scale)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_groups(model: LoadedModel) -> dict[str, str]:
    """module → the first module, by name, that is fed the same tensor (query, key and value share one input)."""
    seen: dict[str, Tensor] = {}
    batch = {name: torch.ones(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), _watching(model, seen):
        model.logits(batch)
    if missing := sorted(model.scale.keys() - seen.keys()):
        raise ConfigError(f"{missing[0]} is adapted but never used by the model; adapt other modules")
    first: dict[int, str] = {}
    return {name: first.setdefault(id(seen[name]), name) for name in sorted(seen)}


def input_grams(
    model: LoadedModel, data: FederatedData, positions: np.ndarray, groups: dict[str, str], clip: float, size: int
) -> dict[str, Tensor]:
    """Σ of the clipped Gram matrices of these texts, first module of a group → [n, n] float64, with the model as it is
    loaded.

    Raises ConfigError for a layer whose input is not one vector per token (padding could not be told).
    """
    leaders = sorted(set(groups.values()))
    widths = {name: int(model.parameters[f"{name}.lora_A"].shape[1]) for name in leaders}
    total = {name: torch.zeros(n, n, dtype=torch.float64) for name, n in widths.items()}
    ordered = positions[np.argsort(data.tokens.lengths(positions), kind="stable")]
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), _watching(model, seen):
        for start in range(0, len(ordered), size):
            batch = data.batch(ordered[start : start + size], model.tokenizer.pad_token_id)
            mask = batch["attention_mask"]
            model.logits(batch)
            for name in leaders:
                if seen[name].shape[:-1] != mask.shape:
                    raise ConfigError(
                        f"{name} is fed {tuple(seen[name].shape)} for {tuple(mask.shape)} tokens; adapt other modules"
                    )
            sums, _ = clipped_grams({name: seen[name] for name in leaders}, mask, clip)
            for name in leaders:
                total[name] += sums[name]
    return total
