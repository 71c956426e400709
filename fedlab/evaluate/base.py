"""What an evaluator is: a way to score a model on some examples, by names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.models.loaded import LoadedModel

Score = Callable[[LoadedModel, FederatedData, np.ndarray, EvaluateSection], dict[str, float]]


@dataclass(frozen=True)
class Evaluator:
    """One way to score a model.

    Args:
        scores: the names of what it gives.
        objectives: names of the objectives that it knows how to judge.
        score: (the model as it is loaded, the data, positions [N >= 1] in the corpus, [evaluate]) → a number
            for each of ``scores``.
    """

    scores: tuple[str, ...]
    objectives: frozenset[str]
    score: Score
