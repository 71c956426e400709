"""Accuracy, macro-F1 and loss of the model as it is loaded, on held-out examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedlab.data import FederatedData
from fedlab.models.loaded import LoadedModel


@dataclass(frozen=True)
class Scores:
    """Of one set of examples. All three are nan for an empty set."""

    examples: int
    accuracy: float  # share of examples whose arg-max is the label
    macro_f1: float  # unweighted mean of F1 over the classes that occur in the set; 0/0 counts as 0
    loss: float  # mean cross-entropy, nats


def classify(model: LoadedModel, data: FederatedData, indices: np.ndarray, batch_size: int) -> Scores:
    """Score the examples ``indices`` (positions in the corpus) in batches of texts of like length."""
    if len(indices) == 0:
        return Scores(0, float("nan"), float("nan"), float("nan"))
    ordered = indices[np.argsort(data.tokens.lengths(indices), kind="stable")]
    predicted, labels, loss = [], [], 0.0
    with torch.inference_mode():
        for start in range(0, len(ordered), batch_size):
            batch = data.batch(ordered[start : start + batch_size], model.tokenizer.pad_token_id)
            logits = model.logits(batch).cpu()
            loss += float(cross_entropy(logits, batch["labels"], reduction="sum"))
            predicted.append(logits.argmax(-1).numpy())
            labels.append(batch["labels"].numpy())
    return scores(np.concatenate(predicted), np.concatenate(labels), loss / len(ordered))


def scores(predicted: np.ndarray, labels: np.ndarray, loss: float) -> Scores:
    """Scores from predicted and true classes, [N] each."""
    classes = int(max(predicted.max(), labels.max())) + 1
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(
        classes, classes
    )  # [true, predicted]
    hits, support, guesses = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits / np.maximum(support + guesses, 1)
    return Scores(len(labels), float(hits.sum() / len(labels)), float(f1[support > 0].mean()), loss)
