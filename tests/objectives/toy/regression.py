"""A toy objective for tests: one number per text, squared error. Lower is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlab.errors import ConfigError
from fedlab.objectives.base import Batch, Model, Objective


@dataclass(frozen=True)
class ToyRegression(Objective):
    """Labels are numbers without names."""

    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    evaluators = ("toy-errors",)
    primary = "mean_absolute_error"
    higher_is_better = False

    @classmethod
    def encode_labels(
        cls, written: Sequence[str], names: tuple[str, ...], corpus: str
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        try:
            return np.array([float(label) for label in written], dtype=np.float32), ()
        except ValueError as error:
            raise ConfigError(f"data: {corpus} has a label that is no number: {error}") from None

    @property
    def head_width(self) -> int:
        return 1

    def per_example_loss(self, model: Model, batch: Batch) -> Tensor:
        return (self.predict(model, batch) - batch["labels"].to(model.device)).square()

    def predict(self, model: Model, batch: Batch) -> Tensor:
        return self.logits(model, batch)[:, 0]

    def probe_labels(self, input_ids: Tensor) -> Tensor:
        return torch.zeros(len(input_ids))
