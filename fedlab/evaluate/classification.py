"""Accuracy, macro-F1 and loss of a classifier on held-out examples."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.evaluate.base import Evaluator
from fedlab.models.loaded import LoadedModel


def classify(
    model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection
) -> dict[str, float]:
    """Scores of the examples ``indices`` [N], in batches of texts of like length.

    ``accuracy``: share of examples whose arg-max is the label. ``macro_f1``: unweighted mean of F1 over the classes
    that occur; 0/0 counts as 0. ``loss``: mean cross-entropy, nats.
    """
    predicted, labels, loss = [], [], 0.0
    with torch.inference_mode():
        for chunk in by_length(data.tokens.lengths(indices), settings.batch_size):
            batch = data.batch(indices[chunk], model.tokenizer.pad_token_id)
            logits = model.logits(batch).cpu()
            loss += float(cross_entropy(logits, batch["labels"], reduction="sum"))
            predicted.append(logits.argmax(-1).numpy())
            labels.append(batch["labels"].numpy())
    accuracy, macro_f1 = accuracy_and_f1(np.concatenate(predicted), np.concatenate(labels))
    return {"accuracy": accuracy, "macro_f1": macro_f1, "loss": loss / len(indices)}


def accuracy_and_f1(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(accuracy, macro-F1) of predicted and true classes, [N] each."""
    classes = int(max(predicted.max(), labels.max())) + 1
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(
        classes, classes
    )  # [true, predicted]
    hits, support, guesses = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits / np.maximum(support + guesses, 1)
    return float(hits.sum() / len(labels)), float(f1[support > 0].mean())


EVALUATOR = Evaluator(("accuracy", "macro_f1", "loss"), frozenset({"classification"}), classify)
