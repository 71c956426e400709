"""GLUE's scores (Wang et al. 2019, arXiv 1804.07461) that are neither accuracy nor those of numbers: Matthews'
correlation for CoLA, F1 of the positive label for MRPC and QQP.

STS-B's Pearson and Spearman are the evaluator ``regression``'s; accuracy is ``classification``'s.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.evaluate.base import Evaluator
from fedlab.models.loaded import LoadedModel


def glued(model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection) -> dict[str, float]:
    """Scores of the examples ``indices`` [N].

    ``matthews``: correlation of predicted and true labels, −1 to 1 (of more than two labels Gorodkin's R_K); 0 where
    either side has one label only. ``f1``: of the second label where there are two, 0/0 counting as 0; NaN otherwise.
    """
    found, labels, width = [], [], model.objective.head_width or 0
    with torch.inference_mode():
        for chunk in by_length(data.tokens.lengths(indices), settings.batch_size):
            batch = data.batch(indices[chunk], model.tokenizer.pad_token_id)
            found.append(model.objective.predict(model, batch).cpu().numpy())
            labels.append(batch["labels"].numpy())
    predicted, true = np.concatenate(found), np.concatenate(labels)
    return {"matthews": matthews(predicted, true), "f1": f1(predicted, true) if width == 2 else math.nan}


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of predicted and true positions [N] of any number of labels."""
    width = int(max(predicted.max(), labels.max())) + 1
    guesses, support = (np.bincount(side, minlength=width).astype(float) for side in (predicted, labels))
    count, hits = float(len(labels)), float((predicted == labels).sum())
    scale = (count**2 - guesses @ guesses) * (count**2 - support @ support)
    return float((hits * count - guesses @ support) / math.sqrt(scale)) if scale > 0 else 0.0


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of the label at position 1."""
    hits, either = int(((predicted == 1) & (labels == 1)).sum()), int((predicted == 1).sum() + (labels == 1).sum())
    return 2 * hits / either if either else 0.0


EVALUATOR = Evaluator(("matthews", "f1"), frozenset({"classification"}), glued)
