"""Whether a classifier is as sure as it is right.

Expected calibration error as in Guo et al. (2017, arXiv 1706.04599, eq. 3): predictions in ``BINS`` bins of equal width
by the probability of the label that is predicted, |share that is right − mean probability| averaged over examples. It
depends on the bins, and is biased upwards where examples are few. Brier's score (1950) needs no bins.
"""

from __future__ import annotations

import numpy as np
import torch

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.evaluate.base import Evaluator
from fedlab.models.loaded import LoadedModel

BINS = 15


def calibrated(
    model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection
) -> dict[str, float]:
    """Scores of the examples ``indices`` [N].

    ``ece``: expected calibration error, 0 to 1. ``brier``: mean over examples of the squared distance of the
    probabilities to what is so, summed over labels, 0 to 2; of two labels twice the score of the one.
    """
    found, labels = [], []
    with torch.inference_mode():
        for chunk in by_length(data.tokens.lengths(indices), settings.batch_size):
            batch = data.batch(indices[chunk], model.tokenizer.pad_token_id)
            found.append(model.logits(batch).double().softmax(-1).cpu().numpy())
            labels.append(batch["labels"].numpy())
    return ece_and_brier(np.concatenate(found), np.concatenate(labels))


def ece_and_brier(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """``ece`` and ``brier`` of probabilities [N, labels] and the true positions [N]."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)  # (0, 1/15], (1/15, 2/15] …
    gaps = np.bincount(bins, right - sure, minlength=BINS)
    wanted = np.zeros_like(probabilities)
    wanted[np.arange(len(labels)), labels] = 1
    return {
        "ece": float(np.abs(gaps).sum() / len(labels)),
        "brier": float(((probabilities - wanted) ** 2).sum(1).mean()),
    }


EVALUATOR = Evaluator(("ece", "brier"), frozenset({"classification"}), calibrated)
