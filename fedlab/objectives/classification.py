"""Sequence classification: one label per text, cross-entropy over the labels' names by a trained head.

In a stream whose tasks have heads of their own (``stream.heads = "own"``), a text is classified among its own task's
labels: the logits of the others are −∞.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlab.errors import ConfigError
from fedlab.objectives.base import Batch, Model, Objective


@dataclass(frozen=True)
class Classification(Objective):
    """Classes by name; labels are positions among the names."""

    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    evaluators = ("classification",)
    primary = "accuracy"
    named = True

    @classmethod
    def encode_labels(
        cls, written: Sequence[str], names: tuple[str, ...], corpus: str
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Positions [N] int64 in the source's names, or in the sorted ones; integers sort as numbers."""
        names = names or in_order(set(written))
        position = {name: i for i, name in enumerate(names)}
        return np.array([position[value] for value in written], dtype=np.int64), names

    @classmethod
    def check_labels(cls, names: tuple[str, ...], corpus: str) -> None:
        """A classifier needs two labels at least."""
        if len(names) < 2:
            raise ConfigError(f"data: {corpus} has {len(names)} label(s); a classifier needs at least 2")

    @property
    def head_width(self) -> int:
        """One output per label."""
        return len(self.labels)

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """[N, labels], float32; −∞ for labels of other tasks' heads."""
        logits = super().logits(model, batch)
        if not self.groups:
            return logits
        groups = torch.tensor(self.groups)
        allowed = groups[None] == groups[batch["labels"]][:, None]  # [N, labels]: those of the text's own task
        return logits.masked_fill(~allowed.to(model.device), -torch.inf)

    def per_example_loss(self, model: Model, batch: Batch) -> Tensor:
        """Cross-entropy in nats, [N]."""
        return cross_entropy(self.logits(model, batch), batch["labels"].to(model.device), reduction="none")

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """Position of the most probable label, [N]."""
        return self.logits(model, batch).argmax(-1)

    def probe_labels(self, input_ids: Tensor) -> Tensor:
        """One label after the other."""
        return torch.arange(len(input_ids)) % len(self.labels)


def in_order(names: set[str]) -> tuple[str, ...]:
    """Names of labels, sorted; integers as numbers."""
    numeric = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numeric else None))
