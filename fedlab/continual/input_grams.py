"""What a task's texts put into the adapted layers of a model: their clipped Gram matrices, one per distinct input."""

from __future__ import annotations

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from fedlab.continual.sketch import clipped_grams
from fedlab.data import FederatedData
from fedlab.data.collate import by_length, probe_batch
from fedlab.errors import ConfigError
from fedlab.models.loaded import LoadedModel
from fedlab.models.watch import watching


def _last_inputs(model: LoadedModel, seen: dict[str, Tensor]) -> AbstractContextManager[None]:
    """While open, every adapted module leaves its last input in ``seen``."""

    def note(module: str, x: Tensor | None, _: Tensor) -> None:
        assert x is not None
        seen[module] = x

    return watching(model.adapted, note)


def input_groups(model: LoadedModel) -> dict[str, str]:
    """module → the first module, by name, that is fed the same tensor (query, key and value share one input)."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), _last_inputs(model, seen):
        model.objective.visit(model, probe_batch(model.tokenizer, model.objective, 1, 4))
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
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), _last_inputs(model, seen):
        for chunk in by_length(data.tokens.lengths(positions), size):
            batch = data.batch(positions[chunk], model.tokenizer.pad_token_id)
            mask = batch["attention_mask"]
            model.objective.visit(model, batch)
            for name in leaders:
                if seen[name].shape[:-1] != mask.shape:
                    raise ConfigError(
                        f"{name} is fed {tuple(seen[name].shape)} for {tuple(mask.shape)} tokens; adapt other modules"
                    )
            sums, _ = clipped_grams({name: seen[name] for name in leaders}, mask, clip)
            for name in leaders:
                total[name] += sums[name]
    return total
