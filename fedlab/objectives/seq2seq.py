"""Sequence to sequence (T5, BART): a text in, another out, cross-entropy over the tokens of the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedlab.objectives.base import NO_LOSS, Batch, Model
from fedlab.objectives.causal_lm import ended
from fedlab.objectives.language import LanguageModel


@dataclass(frozen=True)
class Seq2Seq(LanguageModel):
    """An encoder reads the text column, a decoder says the label column."""

    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"
    evaluators = ("language", "generation")
    encoding = "seq2seq/1"
    shift = False

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        labels: np.ndarray | None,
        tokenizer: Any,
        max_length: int,
    ) -> dict[str, list[list[int]]]:
        """See ``Objective.encode``; the answer is cut to ``max_length`` tokens of its own."""
        rows = super().encode(texts, pairs, None, tokenizer, max_length)
        rows.pop("token_type_ids", None)
        if labels is None:
            return rows
        answers = tokenizer(text_target=[str(label) for label in labels], truncation=False)["input_ids"]
        return rows | {"labels": [ended(ids, tokenizer)[:max_length] for ids in answers]}

    def inputs(self, model: Model, batch: Batch) -> Batch:
        """What the encoder reads, and the labels shifted to the right for the decoder, which is fed its start alone
        where there are none.
        """
        own = super().inputs(model, batch)
        base = cast(Any, model).module.get_base_model()
        labels = batch.get("labels")
        if labels is None:
            labels = torch.full_like(batch["input_ids"][:, :1], NO_LOSS)
        return own | {"decoder_input_ids": decoder_inputs(base, labels)}

    def probe_labels(self, input_ids: Tensor) -> Tensor:
        """The tokens themselves."""
        return input_ids.clone()


def decoder_inputs(base: Any, labels: Tensor) -> Tensor:
    """What a decoder reads where it is to say ``labels`` [N, T]: its start, and the labels but the last, −100 as
    padding. A family's own way (mBART begins with the language) comes first.
    """
    own = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return cast(Tensor, own(labels=labels))
    config = base.config
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == NO_LOSS, config.pad_token_id)], 1)
