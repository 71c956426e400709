"""How well a language model says the label tokens of held-out examples, with each token given those before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import numpy as np
import torch

from fedlab.config.sections import EvaluateSection
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.evaluate.base import Evaluator
from fedlab.models.loaded import LoadedModel
from fedlab.objectives.base import NO_LOSS, Batch
from fedlab.objectives.language import LanguageModel, output_layer
from fedlab.objectives.vocabulary import scored

GENERATIVE = frozenset({"causal-lm", "instruction", "seq2seq"})
MOST = 700.0  # nats; the exponential of more is no float


def tokens(model: LoadedModel, data: FederatedData, indices: np.ndarray, settings: EvaluateSection) -> dict[str, float]:
    """Scores over all label tokens of the examples ``indices`` [N]: long answers count more.

    ``loss``: nats per label token. ``perplexity``: its exponential. ``bits_per_byte``: bits per byte of the labels'
    text, which tokenizers of unlike vocabularies can be compared by. ``token_accuracy``: share of label tokens that are
    the most probable ones. NaN where there is no label token, or they are no text.
    """
    pad = cast(int, model.tokenizer.pad_token_id)
    chunks = by_length(data.tokens.lengths(indices), settings.batch_size)
    return over(model, cast(LanguageModel, model.objective), (data.batch(indices[chunk], pad) for chunk in chunks))


def over(model: LoadedModel, objective: LanguageModel, batches: Iterable[Batch]) -> dict[str, float]:
    """The scores of ``tokens`` over padded batches, whose labels the objective learns."""
    layer = output_layer(model)
    nats, count, size, hits = 0.0, 0, 0, 0
    with torch.inference_mode():
        for batch in batches:
            found = objective.labelled(model, batch)
            losses, best = scored(found.hidden, found.targets, layer.weight, layer.bias)
            nats, count = nats + float(losses.double().sum()), count + len(losses)
            hits += int((best == found.targets).sum())
            size += sum(len(said(model, row.numpy()).encode()) for row in batch["labels"])
    loss = nats / count if count else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, MOST)),
        "bits_per_byte": nats / math.log(2) / size if size else math.nan,
        "token_accuracy": hits / count if count else math.nan,
    }


def said(model: LoadedModel, labels: np.ndarray) -> str:
    """The text of a row of labels."""
    ids = labels[labels != NO_LOSS].tolist()
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


EVALUATOR = Evaluator(("loss", "perplexity", "bits_per_byte", "token_accuracy"), GENERATIVE, tokens)
