"""A toy evaluator for tests: errors of predicted numbers."""

from __future__ import annotations

import numpy as np
import torch

from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.evaluate.base import Evaluator
from fedlab.models.loaded import LoadedModel


def errors(model: LoadedModel, data: FederatedData, indices: np.ndarray, batch_size: int) -> dict[str, float]:
    """Mean absolute and root mean square error."""
    gaps = []
    with torch.inference_mode():
        for chunk in by_length(data.tokens.lengths(indices), batch_size):
            batch = data.batch(indices[chunk], model.tokenizer.pad_token_id)
            gaps.append((model.objective.predict(model, batch).cpu() - batch["labels"]).double())
    found = torch.cat(gaps)
    return {"mean_absolute_error": float(found.abs().mean()), "root_mean_square": float(found.square().mean().sqrt())}


EVALUATOR = Evaluator(("mean_absolute_error", "root_mean_square"), frozenset({"toy-regression"}), errors)
