"""The loss of single records, which is all that both attacks see of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from fedlab.data.collate import by_length
from fedlab.models.loaded import LoadedModel
from fedlab.objectives.base import Batch

MOST = 1e9


def record_losses(
    model: LoadedModel, lengths: np.ndarray, batch: Callable[[np.ndarray, int], Batch], size: int
) -> np.ndarray:
    """The objective's loss of each record under the model as it is loaded, [N] float64 and finite: what is no number,
    of a model that diverged, is the largest there is and tells nothing.

    Args:
        model: with its adapter.
        lengths: tokens of each record [N].
        batch: (positions in ``lengths``, padding id) → a padded batch of these records.
        size: records per forward pass.
    """
    found = np.empty(len(lengths))
    pad = cast(int, model.tokenizer.pad_token_id)
    with torch.inference_mode():
        for chunk in by_length(lengths, size):
            losses = model.objective.per_example_loss(model, batch(chunk, pad))
            found[chunk] = losses.double().cpu().numpy()
    return np.nan_to_num(found, nan=MOST, posinf=MOST, neginf=MOST)
