"""F1, exact match and loss of texts that have any number of labels."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.evaluate.base import Evaluator
from fedlab.models.loaded import LoadedModel
from fedlab.objectives.multi_label import MultiLabel


def several(
    model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection
) -> dict[str, float]:
    """Scores of the examples ``indices`` [N]; a label is predicted where it is more probable than not.

    ``micro_f1``: F1 over all pairs of a text and a label. ``macro_f1``: unweighted mean of F1 over the labels that
    occur. ``exact_match``: share of texts whose labels are all right (subset accuracy). ``loss``: mean over texts of
    the mean binary cross-entropy over labels, nats. 0/0 counts as 0.
    """
    objective = cast(MultiLabel, model.objective)
    found, labels, loss = [], [], 0.0
    with torch.inference_mode():
        for chunk in by_length(data.tokens.lengths(indices), settings.batch_size):
            batch = data.batch(indices[chunk], cast(int, model.tokenizer.pad_token_id))
            loss += float(objective.per_example_loss(model, batch).double().sum())
            found.append(objective.predict(model, batch).cpu().numpy())
            labels.append(objective.targets(batch)[0].numpy() > 0)
    return {**f1_and_match(np.concatenate(found), np.concatenate(labels)), "loss": loss / len(indices)}


def f1_and_match(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``micro_f1``, ``macro_f1`` and ``exact_match`` of predicted and true labels, bool [N, labels] each."""
    hits, guesses, support = ((part).sum(0) for part in (found & labels, found, labels))
    f1 = 2 * hits / np.maximum(guesses + support, 1)
    return {
        "micro_f1": float(2 * hits.sum() / max(int((guesses + support).sum()), 1)),
        "macro_f1": float(f1[support > 0].mean()) if (support > 0).any() else 0.0,
        "exact_match": float((found == labels).all(1).mean()),
    }


EVALUATOR = Evaluator(("micro_f1", "macro_f1", "exact_match", "loss"), frozenset({"multi-label"}), several)
