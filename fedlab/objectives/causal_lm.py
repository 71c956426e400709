"""Causal language modelling of plain text: every token after the first is said by the model, and then the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlab.config.data import DataSection
from fedlab.errors import ConfigError
from fedlab.objectives.base import NO_LOSS
from fedlab.objectives.language import LanguageModel


@dataclass(frozen=True)
class CausalLM(LanguageModel):
    """Text is its own label."""

    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"
    encoding = "causal-lm/1"

    @classmethod
    def columns(cls, data: DataSection) -> DataSection:
        """See ``Objective.columns``; there is no column but the text."""
        for key in ("label", "messages", "context"):
            if getattr(data, key) is not None:
                raise ConfigError(
                    f'data.{key} = {getattr(data, key)!r} is not read by objective.name = "causal-lm", which learns the'
                    ' text itself; remove it, or take objective.name = "instruction"'
                )
        return data

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        labels: np.ndarray | None,
        tokenizer: Any,
        max_length: int,
    ) -> dict[str, list[list[int]]]:
        """Tokens, the end-of-text token where the text was not cut, and the same as labels."""
        if labels is None:
            return super().encode(texts, pairs, None, tokenizer, max_length)
        joined = texts if pairs is None else [f"{a}\n{b}" for a, b in zip(texts, pairs, strict=True)]
        rows = [ended(ids, tokenizer)[:max_length] for ids in tokenizer(list(joined), truncation=False)["input_ids"]]
        return {"input_ids": rows, "labels": [[NO_LOSS, *row[1:]] for row in rows]}

    def probe_labels(self, input_ids: Tensor) -> Tensor:
        """The tokens themselves."""
        return torch.cat([torch.full_like(input_ids[:, :1], NO_LOSS), input_ids[:, 1:]], dim=1)


def ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Token ids that end with the end-of-text token, if the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
