"""Multi-label classification: any number of labels per text, binary cross-entropy of each, by a trained head.

The label column holds a list (JSON, parquet, hub), the same list as JSON text (``["sports", "law"]``, in csv too), or
names separated by ``|`` (``sports|law``); ``[]`` is a text without labels, an empty field a row that lacks its label.

In a stream whose tasks have heads of their own (``stream.heads = "own"``), only the labels of a text's own task count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fedlab.data.several import packed, unpacked
from fedlab.errors import ConfigError
from fedlab.objectives.base import Batch, Model, Objective
from fedlab.objectives.classification import in_order

SEPARATOR = "|"


@dataclass(frozen=True)
class MultiLabel(Objective):
    """A batch's ``labels`` are rows [task, positions of the text's labels, −100 …]."""

    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    problem = "multi_label_classification"
    evaluators = ("multi-label",)
    primary = "micro_f1"
    named = True
    several = True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """With the names, whose order decides positions."""
        return json.dumps(["multi-label/1", *self.labels])

    @classmethod
    def unfit(cls, label: str) -> str | None:
        """See ``Objective.unfit``."""
        names = names_of(label)
        if names is None:
            return "begins with [ and is no JSON list of names"
        return None if all(names) else "has an empty name in it"

    @classmethod
    def encode_labels(
        cls, written: Sequence[str], names: tuple[str, ...], corpus: str
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """One string for the labels of each text, [N] of str; names in the source's order, or sorted."""
        found = [names_of(label) or [] for label in written]
        labels = np.empty(len(found), dtype=object)
        labels[:] = [packed(own) for own in found]
        return labels, names or in_order({name for own in found for name in own})

    @classmethod
    def check_labels(cls, names: tuple[str, ...], corpus: str) -> None:
        """There must be something to tell."""
        if not names:
            raise ConfigError(f"data: {corpus} has no labels: every list in its label column is empty")

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        labels: np.ndarray | None,
        tokenizer: Any,
        max_length: int,
    ) -> dict[str, list[list[int]]]:
        """See ``Objective.encode``; labels are [task, positions …]."""
        rows = super().encode(texts, pairs, None, tokenizer, max_length)
        if labels is None:
            return rows
        position = {name: i for i, name in enumerate(self.labels)}
        own = [unpacked(label) for label in labels]
        return rows | {"labels": [[task, *sorted(position[name] for name in names)] for task, names in own]}

    @property
    def head_width(self) -> int:
        """One output per label."""
        return len(self.labels)

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is so, 0 or 1, and which labels count for each text (those of its task), bool; [N, labels] each."""
        held = batch["labels"][:, 1:]
        there = held >= 0
        wanted = torch.zeros(len(held), len(self.labels))
        wanted[there.nonzero()[:, 0], held[there]] = 1.0
        if not self.groups:
            return wanted, torch.ones_like(wanted, dtype=torch.bool)
        return wanted, torch.tensor(self.groups)[None] == batch["labels"][:, :1].cpu()

    def per_example_loss(self, model: Model, batch: Batch) -> Tensor:
        """Binary cross-entropy in nats, its mean over the labels that count, [N]."""
        wanted, counts = (value.to(model.device) for value in self.targets(batch))
        losses = binary_cross_entropy_with_logits(self.logits(model, batch), wanted, reduction="none")
        return (losses * counts).sum(1) / counts.sum(1)

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """Whether each label is more probable than not, [N, labels], bool; never one of another task."""
        return (self.logits(model, batch) > 0) & self.targets(batch)[1].to(model.device)

    def probe_labels(self, input_ids: Tensor) -> Tensor:
        """One label each, one after the other."""
        own = torch.arange(len(input_ids)) % len(self.labels)
        task = torch.tensor(self.groups)[own] if self.groups else torch.zeros_like(own)
        return torch.stack([task, own], 1)


def names_of(label: str) -> list[str] | None:
    """The names in a label as it is written; None where it is to be a list and is none."""
    if not label.startswith("["):
        return [name.strip() for name in label.split(SEPARATOR)]
    try:
        found = json.loads(label)
    except (ValueError, RecursionError):
        return None
    plain = [value.strip() if isinstance(value, str) else str(value) for value in found]
    single = all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in found)
    return plain if single else None
