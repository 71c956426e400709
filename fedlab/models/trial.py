"""Rows to try a model on where no data may be touched: what its tokenizer makes of nothing, filled with random tokens.

Special tokens stand where the tokenizer puts them, because some models do not read a text without (T5 and BART look for
the end-of-text token). Nothing here depends on anybody's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedlab.models.loaded import LoadedModel
from fedlab.objectives.base import NO_LOSS, Batch
from fedlab.seeds import random_stream

LENGTHS = (3, 6)  # words of the two rows: unequal, so that the first is padded, and no length is the number of rows
SPECIAL = 8  # places for tokens that the tokenizer adds


def trial_rows(model: LoadedModel, lengths: Sequence[int] = LENGTHS) -> list[Batch]:
    """One batch of one row for each of ``lengths``, without padding, with labels that the objective can learn."""
    tokenizer, rng = cast(Any, model.tokenizer), random_stream(0, "trial")
    limit = min(len(tokenizer), getattr(model.module.config, "vocab_size", None) or len(tokenizer))
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([i for i in range(limit) if i not in special] or range(limit))
    rows = []
    for i, length in enumerate(lengths):
        encoded = model.objective.encode([" ".join(["a"] * length)], None, None, tokenizer, length + SPECIAL)
        ids = np.array(encoded["input_ids"][0])
        word = int(np.bincount(ids).argmax())  # may be the unknown word's, which is a special token too
        words = ~np.isin(ids, list(special - {word}))
        ids[words] = rng.choice(ordinary, int(words.sum()))
        row = {"input_ids": torch.from_numpy(ids)[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if "token_type_ids" in encoded:
            row["token_type_ids"] = torch.tensor(encoded["token_type_ids"])
        labels = model.objective.probe_labels(row["input_ids"].expand(i + 1, -1))  # rows of unlike labels
        rows.append(row | {"labels": labels[i:]})
    return rows


def together(rows: Sequence[Batch], pad_id: int) -> Batch:
    """The rows as one batch, padded on the right as clients' batches are."""
    fills = {"input_ids": pad_id, "labels": NO_LOSS}
    return {name: _padded([row[name][0] for row in rows], fills.get(name, 0)) for name in rows[0]}


def _padded(values: Sequence[Tensor], fill: int) -> Tensor:
    if values[0].ndim == 0:
        return torch.stack(list(values))
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=fill)
