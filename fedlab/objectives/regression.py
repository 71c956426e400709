"""Regression: one number per text, squared error, by a trained head of one output.

Numbers are learnt as they are written. An example's gradient grows with its error, and DP clips it: labels near 0 with
a spread near 1 learn best, and scaling by constants that are not taken from the data costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlab.objectives.base import Batch, Model, Objective

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Regression(Objective):
    """Labels are finite numbers without names, kept as float32."""

    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    problem = "regression"
    evaluators = ("regression",)
    primary = "rmse"
    higher_is_better = False

    @classmethod
    def unfit(cls, label: str) -> str | None:
        """See ``Objective.unfit``: labels are finite numbers."""
        try:
            value = math.nan if "_" in label else float(label)
        except ValueError:
            value = math.nan
        return None if abs(value) <= LARGEST else "is no finite number"

    @classmethod
    def encode_labels(
        cls, written: Sequence[str], names: tuple[str, ...], corpus: str
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """The numbers [N], float32; a source's own names of classes that are numbers are those numbers."""
        return np.array([float(label) for label in written], dtype=np.float32), ()

    @property
    def head_width(self) -> int:
        """One output."""
        return 1

    def per_example_loss(self, model: Model, batch: Batch) -> Tensor:
        """(ŷ − y)², [N]."""
        return (self.predict(model, batch) - batch["labels"].to(model.device)).square()

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """The number that is expected, [N], float32."""
        return self.logits(model, batch)[:, 0]

    def probe_labels(self, input_ids: Tensor) -> Tensor:
        """0, 1, 0, …"""
        return (torch.arange(len(input_ids)) % 2).float()
