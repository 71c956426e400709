"""What all generative objectives share: the loss of the tokens that an example is to produce, and its mean or sum.

An example is one record, whatever it holds: no packing. Its loss is the mean over its label tokens by default, so that
a long answer does not own the clip; ``objective.loss = "sum"`` weights every token alike, which is the likelihood, and
under DP lets the clip cut long answers more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from fedlab.config.sections import ObjectiveSection
from fedlab.errors import ConfigError
from fedlab.objectives.base import NO_LOSS, Batch, Model, Objective
from fedlab.objectives.vocabulary import OutputLayer, chunk_bytes, most_probable, token_losses

AGREES = 1e-3  # relative difference of logits by the output layer alone to those of the whole model; bfloat16 has 4e-3


class Labelled(NamedTuple):
    """The labelled positions of a batch, in the order of its rows.

    Args:
        hidden: [M, d], what the output layer is fed where the label is to be said.
        targets: [M], the labels.
        rows: [M], row of the batch.
    """

    hidden: Tensor
    targets: Tensor
    rows: Tensor


@dataclass(frozen=True)
class LanguageModel(Objective):
    """Base of the generative objectives; ``loss`` is "mean" or "sum" over an example's label tokens."""

    loss: str = "mean"

    evaluators: ClassVar[tuple[str, ...]] = ("language",)
    primary = "loss"
    higher_is_better = False
    has_head: ClassVar[bool] = False  # the output layer stays the base's own
    shift: ClassVar[bool] = True  # whether position t says token t + 1 (a decoder alone), or token t

    @classmethod
    def of(cls, section: ObjectiveSection, labels: tuple[str, ...], groups: tuple[int, ...]) -> Self:
        """See ``Objective.of``."""
        read = {"labels": "", "template": "instruction", "system": "instruction"}
        for key, reader in read.items():
            if getattr(section, key) != type(section).model_fields[key].default and section.name != reader:
                raise ConfigError(f'objective.{key} is not read by objective.name = "{section.name}"; remove it')
        return cls((), (), section.loss)

    @classmethod
    def encode_labels(
        cls, written: Sequence[str], names: tuple[str, ...], corpus: str
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Answers as they are written; ``encode`` makes tokens of them."""
        kept = np.empty(len(written), dtype=object)
        kept[:] = list(written)
        return kept, ()

    def prompt_ids(self, prompt: str, tokenizer: Any) -> list[int]:
        """What a model reads before it answers."""
        ids = list(tokenizer(prompt, truncation=False)["input_ids"])
        ends = self.shift and ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
        return ids[:-1] if ends else ids  # a text that has ended is not gone on with

    @classmethod
    def secret_record(cls, prompt: str, secret: str) -> tuple[str, str]:
        """See ``Objective.secret_record``."""
        return prompt, secret

    def labelled(self, model: Model, batch: Batch) -> Labelled:
        """The positions that have a label; differentiable in the model's trained tensors."""
        with output_layer(model).left_out():
            hidden: Tensor = model.outputs(batch).logits
        labels = batch["labels"].to(hidden.device)
        if self.shift:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        where = labels != NO_LOSS
        return Labelled(hidden[where], labels[where], where.nonzero()[:, 0])

    def per_token_loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """(losses in nats [M], rows [M]) of the labelled positions."""
        found = self.labelled(model, batch)
        layer = output_layer(model)
        return token_losses(found.hidden, found.targets, layer.weight, layer.bias), found.rows

    def per_example_loss(self, model: Model, batch: Batch) -> Tensor:
        """Cross-entropy of each example's label tokens in nats, their mean or sum, [N]; 0 where there are none."""
        losses, rows = self.per_token_loss(model, batch)
        sums = losses.new_zeros(len(batch["labels"])).index_add(0, rows, losses)
        if self.loss == "sum":
            return sums
        return sums / torch.bincount(rows, minlength=len(sums)).clamp(min=1)

    def predict(self, model: Model, batch: Batch) -> Tensor:
        """The most probable token where there is a label, −100 elsewhere, [N, T], as ``labels`` are."""
        found = self.labelled(model, batch)
        layer = output_layer(model)
        labels = batch["labels"].to(model.device)
        answer = torch.full_like(labels, NO_LOSS)
        where = labels != NO_LOSS
        if self.shift:
            where[:, 0] = False
        answer[where] = most_probable(found.hidden, layer.weight, layer.bias)
        return answer

    def visit(self, model: Model, batch: Batch) -> None:
        """See ``Objective.visit``; without logits, which no layer below them sees."""
        with output_layer(model).left_out():
            model.outputs(batch)

    def loss_bytes(self, model: Model, positions: int) -> int:
        """See ``Objective.loss_bytes``: logits of a chunk."""
        return chunk_bytes(output_layer(model).weight, positions)

    def check_model(self, model: Model, batch: Batch) -> None:
        """Raise ConfigError unless the base's logits are its output layer's alone: whatever comes after it (soft caps,
        scales) would be missing from the loss.
        """
        layer, cap = output_layer(model), _cap(model)
        with torch.no_grad():
            wanted: Tensor = model.outputs(batch).logits.float()
            with layer.left_out():
                found = linear(model.outputs(batch).logits, layer.weight, layer.bias).float()
        limit = AGREES if layer.weight.dtype == torch.float32 else 20 * AGREES
        if cap or found.shape != wanted.shape or not (found - wanted).norm() <= limit * wanted.norm():
            family = type(cast(Any, model).module.get_base_model()).__name__
            raise ConfigError(
                f"model.name: {family} does more to its logits than its output layer{cap}, which losses by chunks would"
                " miss; take another model"
            )

    @abstractmethod
    def probe_labels(self, input_ids: Tensor) -> Tensor:
        """See ``Objective.probe_labels``."""


def _cap(model: Model) -> str:
    """The soft cap of a model's configuration, for messages."""
    cap = getattr(cast(Any, model).module.config, "final_logit_softcapping", None)
    return "" if cap is None else f" (a soft cap, final_logit_softcapping = {cap:g})"


def output_layer(model: Model) -> OutputLayer:
    """The base's output layer. Raises ConfigError if it has none."""
    base = cast(Any, model).module.get_base_model()
    layer = base.get_output_embeddings()
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise ConfigError("model.name: this model has no output layer over its vocabulary")
    return OutputLayer.of(base, layer)
