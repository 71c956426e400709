"""Multiple choice by log-likelihood: which of the answers in ``evaluate.choices`` a model holds for the most probable.

As lm-eval's ``multiple_choice`` does: the likelihood of each whole answer after the prompt, with its end, and once more
divided by the answer's length in bytes, so that short answers are not preferred for being short. Nothing is generated.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import numpy as np
import torch

from fedlab.config import RunConfig
from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.errors import ConfigError
from fedlab.evaluate.base import Evaluator
from fedlab.evaluate.generation import prompt_and_answer
from fedlab.models.loaded import LoadedModel
from fedlab.objectives.base import NO_LOSS, Batch, Objective
from fedlab.objectives.language import LanguageModel, output_layer
from fedlab.objectives.seq2seq import Seq2Seq
from fedlab.objectives.vocabulary import token_losses

logger = logging.getLogger("fedlab")
LONG = 2**20  # tokens that no answer has
SHOWN = 40  # characters of one in an error


def chosen(model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection) -> dict[str, float]:
    """Scores of the examples ``indices`` [N]; one whose answer is none of the choices is never right.

    ``choice_accuracy``: share whose answer is the most probable choice. ``choice_accuracy_norm``: the same by
    log-likelihood per byte.
    """
    answers = [answer_ids(model.objective, model.tokenizer, choice) for choice in settings.choices]
    names = [_text(model.tokenizer, ids) for ids in answers]
    prompts, written = zip(*(prompt_and_answer(model, data, i) for i in indices), strict=True)
    found = likelihoods(model, list(prompts), answers, settings.batch_size)
    sizes = np.array([max(1, len(name.encode())) for name in names])
    right = np.array([names.index(text.strip()) if text.strip() in names else -1 for text in written])
    if (right < 0).all():
        logger.warning(
            "evaluate.choices: none of the %d answers scored is one of %s (%r, for example); write the choices as the"
            " records have them",
            len(right),
            ", ".join(repr(name) for name in names),
            written[0].strip()[:SHOWN],
        )
    return {
        "choice_accuracy": float((found.argmax(1) == right).mean()),
        "choice_accuracy_norm": float(((found / sizes).argmax(1) == right).mean()),
    }


def check_choices(config: RunConfig, objective: Objective, tokenizer: Any) -> None:
    """Raise ConfigError for an answer that could not be chosen: empty, the same as another, or too long."""
    choices, most = config.evaluate.choices, config.data.max_length
    for i, choice in enumerate(choices):
        if not choice.strip():
            raise ConfigError(f"evaluate.choices: {choice!r} is no answer; remove it")
        if len(answer_ids(objective, tokenizer, choice)) >= most:
            raise ConfigError(
                f"evaluate.choices: {choice[:SHOWN]!r} leaves no room for a prompt in data.max_length = {most}"
                " tokens; shorten it, or raise that"
            )
        text = _text(tokenizer, answer_ids(objective, tokenizer, choice))
        if not text:
            raise ConfigError(f"evaluate.choices: this model's tokenizer has no tokens for {choice!r}; remove it")
        earlier = [one for one in choices[:i] if _text(tokenizer, answer_ids(objective, tokenizer, one)) == text]
        if earlier:
            raise ConfigError(f"evaluate.choices: {choice!r} and {earlier[0]!r} are one answer; remove one of them")


def answer_ids(objective: Objective, tokenizer: Any, choice: str) -> list[int]:
    """Tokens of an answer, with its end, as the objective learns it."""
    answer = np.empty(1, dtype=object)
    answer[0] = choice
    labels = objective.encode(["a"], None, answer, tokenizer, LONG)["labels"][0]
    return [token for token in labels if token != NO_LOSS]


def likelihoods(model: LoadedModel, prompts: list[list[int]], answers: list[list[int]], batch_size: int) -> np.ndarray:
    """Log-likelihood of each answer after each prompt in nats, [prompts, answers]; a prompt that leaves too few
    positions loses its beginning.
    """
    objective, layer = cast(LanguageModel, model.objective), output_layer(model)
    pairs = [(prompt, answer) for prompt in prompts for answer in answers]
    found = np.zeros(len(pairs))
    with torch.inference_mode():
        for rows in by_length(np.array([len(prompt) + len(answer) for prompt, answer in pairs]), batch_size):
            at = objective.labelled(model, _batch(model, [pairs[i] for i in rows]))
            losses = token_losses(at.hidden, at.targets, layer.weight, layer.bias).double().cpu().numpy()
            found[rows] = -np.bincount(at.rows.cpu().numpy(), losses, minlength=len(rows))
    return found.reshape(len(prompts), len(answers))


def _batch(model: LoadedModel, pairs: list[tuple[list[int], list[int]]]) -> Batch:
    """Prompts and answers as a padded batch with labels on the answers."""
    if isinstance(model.objective, Seq2Seq):
        ids, labels = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    else:
        places = getattr(model.module.config, "max_position_embeddings", None) or LONG
        cut = [(prompt[max(0, len(prompt) + len(answer) - places) :], answer) for prompt, answer in pairs]
        ids = [prompt + answer for prompt, answer in cut]
        labels = [[NO_LOSS] * len(prompt) + answer for prompt, answer in cut]
    return {
        "input_ids": _padded(ids, cast(int, model.tokenizer.pad_token_id)),
        "attention_mask": _padded([[1] * len(row) for row in ids], 0),
        "labels": _padded(labels, NO_LOSS),
    }


def _padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def _text(tokenizer: Any, ids: list[int]) -> str:
    """An answer as the examples' answers are read back."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


EVALUATOR = Evaluator(("choice_accuracy", "choice_accuracy_norm"), frozenset({"instruction", "seq2seq"}), chosen)
