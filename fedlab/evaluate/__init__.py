"""What a model is worth: one evaluator per file, registered here. A run has named scores, of which one is primary."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import numpy as np

from fedlab.config import RunConfig
from fedlab.data import FederatedData
from fedlab.errors import ConfigError
from fedlab.evaluate import calibration, choice, classification, generation, glue, language, multi_label, regression
from fedlab.evaluate.base import Evaluator
from fedlab.models.loaded import LoadedModel
from fedlab.objectives import objective_class

EVALUATORS: dict[str, Evaluator] = {
    "classification": classification.EVALUATOR,
    "calibration": calibration.EVALUATOR,
    "choice": choice.EVALUATOR,
    "generation": generation.EVALUATOR,
    "glue": glue.EVALUATOR,
    "language": language.EVALUATOR,
    "multi-label": multi_label.EVALUATOR,
    "regression": regression.EVALUATOR,
}


def evaluators_of(config: RunConfig) -> dict[str, Evaluator]:
    """The evaluators of a run: those that ``evaluate.evaluators`` names, or the objective's own.

    Raises ConfigError for one that is unknown or cannot judge the objective, for two that give a score of the same
    name, and if none gives the primary score.
    """
    name, objective = config.objective.name, objective_class(config.objective.name)
    found: dict[str, Evaluator] = {}
    for wanted in config.evaluate.evaluators or objective.evaluators:
        if wanted not in EVALUATORS or name not in EVALUATORS[wanted].objectives:
            known = sorted(n for n, evaluator in EVALUATORS.items() if name in evaluator.objectives)
            raise ConfigError(
                f'evaluate.evaluators: "{wanted}" cannot judge objective.name = "{name}"; known for it:'
                f" {', '.join(known)}"
            )
        found[wanted] = EVALUATORS[wanted]
    names = [score for evaluator in found.values() for score in evaluator.scores]
    if twice := sorted({score for score in names if names.count(score) > 1}):
        raise ConfigError(f"evaluate.evaluators: two of {', '.join(found)} give {twice[0]!r}; leave one out")
    if ("choice" in found) != (len(config.evaluate.choices) > 1):
        raise ConfigError(
            f"evaluate.choices = {list(config.evaluate.choices)}: the evaluator choice needs two answers or more to"
            ' choose from, as ["yes", "no"], and nothing else reads them'
        )
    if objective.primary not in names:
        raise ConfigError(
            f"evaluate.evaluators = {list(found)}: none gives {objective.primary!r}, the score by which runs are"
            f" compared; add {objective.evaluators[0]}"
        )
    return found


def score_names(config: RunConfig) -> list[str]:
    """Names of a run's scores, in the order of its evaluators."""
    return [score for evaluator in evaluators_of(config).values() for score in evaluator.scores]


def evaluate(model: LoadedModel, data: FederatedData, indices: np.ndarray, config: RunConfig) -> dict[str, float]:
    """Every score of the model as it is loaded, on the examples ``indices`` (positions in the corpus); NaN for none."""
    if len(indices) == 0:
        return dict.fromkeys(score_names(config), math.nan)
    found: dict[str, float] = {}
    for evaluator in evaluators_of(config).values():
        found |= evaluator.score(model, data, indices, config.evaluate)
    return found


def primary_score(model: LoadedModel, data: FederatedData, indices: np.ndarray, config: RunConfig) -> float:
    """The one score by which runs and clients are compared, on these examples; NaN for none."""
    name = primary_name(config)
    if len(indices) == 0:
        return math.nan
    evaluator = next(e for e in evaluators_of(config).values() if name in e.scores)
    return evaluator.score(model, data, indices, config.evaluate)[name]


def primary_name(config: RunConfig) -> str:
    """Name of the score by which runs and clients are compared."""
    return objective_class(config.objective.name).primary


def higher_is_better(config: RunConfig) -> bool:
    """Direction of the primary score."""
    return objective_class(config.objective.name).higher_is_better


def spread(scores: Iterable[float], higher: bool) -> dict[str, float | None]:
    """Mean, worst, mean of the worst tenth (rounded up to whole clients) and population standard deviation over
    clients, NaN left out; None of none.

    ``higher``: whether higher scores are better; the worst is then the lowest.
    """
    values = worst_first(scores, higher)
    if not values:
        return dict.fromkeys(("mean", "worst", "worst_decile", "std"))
    return {
        "mean": statistics.fmean(values),
        "worst": values[0],
        "worst_decile": statistics.fmean(values[: -(-len(values) // 10)]),
        "std": statistics.pstdev(values),
    }


def worst_first(scores: Iterable[float], higher: bool) -> list[float]:
    """Scores in order, the worst first, NaN left out: the curve over clients."""
    return sorted((score for score in scores if not math.isnan(score)), reverse=not higher)
