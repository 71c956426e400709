"""Errors of predicted numbers, and how they go with the true ones; the latter two are GLUE's scores of STS-B."""

from __future__ import annotations

import math

import numpy as np
import torch

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.evaluate.base import Evaluator
from fedlab.models.loaded import LoadedModel


def numbers(
    model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection
) -> dict[str, float]:
    """Scores of the examples ``indices`` [N], in float64.

    ``rmse``: root of the mean squared error. ``mae``: mean absolute error. ``pearson``: correlation of predictions and
    labels. ``spearman``: that of their ranks. Correlations are NaN where either side has one value only.
    """
    found, labels = [], []
    with torch.inference_mode():
        for chunk in by_length(data.tokens.lengths(indices), settings.batch_size):
            batch = data.batch(indices[chunk], model.tokenizer.pad_token_id)
            found.append(model.objective.predict(model, batch).double().cpu().numpy())
            labels.append(batch["labels"].double().numpy())
    return scores_of(np.concatenate(found), np.concatenate(labels))


def scores_of(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``rmse``, ``mae``, ``pearson`` and ``spearman`` of predicted and true numbers, [N] each."""
    gaps = found - labels
    return {
        "rmse": float(np.sqrt(np.mean(gaps**2))),
        "mae": float(np.mean(np.abs(gaps))),
        "pearson": pearson(found, labels),
        "spearman": pearson(ranks(found), ranks(labels)),
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of two series [N]; NaN where one of them is constant."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()) or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares of tiny or huge numbers would be 0 or infinite
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs, [N]."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return shared


EVALUATOR = Evaluator(("rmse", "mae", "pearson", "spearman"), frozenset({"regression"}), numbers)
