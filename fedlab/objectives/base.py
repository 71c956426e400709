"""The contract of an objective: what a model learns, and all that the rest of fedlab may know of it.

An objective says how records become tokens and labels, how a base model is loaded for it and which part of that is a
trained head, what the loss of one example is, what the model predicts, and which evaluators judge it. Trainer, cohort
pass, DP step, empirical audit, continual code, hidden-state cache and memory plan use these methods and nothing else,
so a classifier and a language model go through the same code.

torch, numpy and the configuration only: no Flower, no Ray, no transformers. A tokenizer is called, never imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from fedlab.config.data import DataSection
from fedlab.config.sections import ObjectiveSection
from fedlab.errors import ConfigError

Batch = dict[str, Tensor]
NO_LOSS = -100  # a label at which there is no loss
HEADS = ("classifier", "score", "classification_head", "logits_proj")  # names that transformers gives to heads
BESIDE_INPUTS = ("labels", "hidden")  # entries of a batch that are no arguments of a model's forward pass


class Model(Protocol):
    """What an objective asks of a model (``fedlab.models.loaded.LoadedModel``)."""

    device: torch.device

    def outputs(self, batch: Batch, **options: Any) -> Any:
        """The base model's own output object for a padded batch; ``options`` go to its forward pass."""


def with_label(data: DataSection) -> DataSection:
    """[data] of an objective that learns a column of labels; at the hub its name is usually "label".

    Raises ConfigError for local files without data.label.
    """
    if data.source == "files" and data.label is None:
        raise ConfigError(
            'data.source = "files" needs data.text and data.label: the names of the columns of texts, and of labels or'
            " answers"
        )
    return data.model_copy(update={"label": "label"}) if data.source == "hub" and data.label is None else data


@dataclass(frozen=True)
class Objective(ABC):
    """One objective over one label space. Equal values mean the same model: it is part of the loaded model's key.

    Args:
        labels: names of what is told apart, in the order of the head's outputs; () where labels have no names.
        groups: label → task of a stream whose tasks have heads of their own; () where all tasks share one.
    """

    labels: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()

    auto_class: ClassVar[str]  # of transformers, by name
    task_type: ClassVar[str]  # of peft, by name
    evaluators: ClassVar[tuple[str, ...]]  # that judge it unless ``evaluate.evaluators`` names others
    primary: ClassVar[str]  # the score by which runs and clients are compared; one of its evaluators gives it
    higher_is_better: ClassVar[bool] = True  # of the primary score
    has_head: ClassVar[bool] = True  # whether a head is trained beside the adapter; then ``head_width`` says how wide
    named: ClassVar[bool] = False  # whether labels have names, on which all clients must agree
    several: ClassVar[bool] = False  # whether an example may have any number of labels (``fedlab.data.several``)
    problem: ClassVar[str | None] = None  # transformers' ``problem_type``, for objectives that it has to be told
    encoding: ClassVar[str] = ""  # names what ``encode`` makes beside plain tokens; "" if labels are one number each

    @classmethod
    def of(cls, section: ObjectiveSection, labels: tuple[str, ...], groups: tuple[int, ...]) -> Self:
        """The objective of a configuration over these labels.

        Raises ConfigError for a key of [objective] that it does not read.
        """
        for key in ("loss", "template", "system"):
            if getattr(section, key) != type(section).model_fields[key].default:
                raise ConfigError(f'objective.{key} is not read by objective.name = "{section.name}"; remove it')
        return cls(labels, groups)

    @classmethod
    def columns(cls, data: DataSection) -> DataSection:
        """[data] with the columns that this objective reads, defaults filled in.

        Raises ConfigError for a column that is missing, or that it does not read.
        """
        for key in ("messages", "context"):
            if getattr(data, key) is not None:
                raise ConfigError(
                    f'data.{key} = {getattr(data, key)!r} is read by objective.name = "instruction" alone; give'
                    " data.text and data.label"
                )
        return with_label(data)

    @classmethod
    def unfit(cls, label: str) -> str | None:
        """What is wrong with a label as it is written, in words that follow "a label that"; None if it can be learnt.

        Such rows are refused, or left out, by ``fedlab.data.unfit``.
        """
        return None

    @classmethod
    @abstractmethod
    def encode_labels(
        cls, written: Sequence[str], names: tuple[str, ...], corpus: str
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Labels as they are kept, and their names.

        Args:
            written: label of each example, as its source wrote it.
            names: the source's own order of the labels' names; () if it has none.
            corpus: what error messages call the source.

        Returns:
            [N] int64, float32, or str where ``encode`` makes token sequences of them; and the labels' names or ().

        Raises:
            ConfigError: for labels that this objective cannot learn.
        """

    @classmethod  # noqa: B027 (most objectives take any)
    def check_labels(cls, names: tuple[str, ...], corpus: str) -> None:
        """Raise ConfigError where the labels that are left to a run or a task cannot be learnt."""

    @classmethod
    def secret_record(cls, prompt: str, secret: str) -> tuple[str, str]:
        """(text, label as written) of a record whose label tokens hold ``secret``.

        Raises ConfigError where labels are no text.
        """
        raise ConfigError("data.canaries: secrets are text, which this objective does not learn to say; remove it")

    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        labels: np.ndarray | None,
        tokenizer: Any,
        max_length: int,
    ) -> dict[str, list[list[int]]]:
        """Token sequences of some records: ``input_ids``, ``token_type_ids`` if the tokenizer gives them.

        An objective with an ``encoding`` adds ``labels``: one sequence per record, −100 where there is no loss.
        ``labels`` is None for public texts, which have none. At most ``max_length`` tokens are kept.
        """
        encoded = tokenizer(list(texts), pairs, truncation=True, max_length=max_length, padding=False)
        return {name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}

    @property
    def head_width(self) -> int | None:
        """Outputs of the trained head; None if there is none and the base model's own output layer stays frozen."""
        return None

    def head_modules(self, base: nn.Module, fresh: Collection[str]) -> list[str]:
        """Names of the base's modules that are trained whole.

        ``fresh``: names of the parameters that no checkpoint filled. Empty where there is no head.
        """
        if self.head_width is None:
            return []
        found = sorted({key.rpartition(".")[0] for key in fresh})
        return found or [name for name in HEADS if hasattr(base, name)]

    def inputs(self, model: Model, batch: Batch) -> Batch:
        """Arguments of the base model's forward pass."""
        return {name: value for name, value in batch.items() if name not in BESIDE_INPUTS}

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """What loss and prediction are made of, [N, ...], float32."""
        logits: Tensor = model.outputs(batch).logits
        return logits.float()

    def check_model(self, model: Model, batch: Batch) -> None:  # noqa: B027 (most objectives take any)
        """Raise ConfigError for a model on which this objective would learn something else than it says; ``batch`` is
        made up.
        """

    def visit(self, model: Model, batch: Batch) -> None:
        """Run the model over a batch for what its layers see; ``labels`` may be missing from it."""
        model.outputs(batch)

    def loss_bytes(self, model: Model, positions: int) -> int:
        """Bytes that the loss of so many tokens takes at once beside what autograd keeps; for the memory plan."""
        return 0

    @abstractmethod
    def per_example_loss(self, model: Model, batch: Batch) -> Tensor:
        """Loss of each example of a padded batch, [N], differentiable.

        Formal guarantee that the DP step rests on: entry i depends on example i alone.
        """

    @abstractmethod
    def predict(self, model: Model, batch: Batch) -> Tensor:
        """What the model answers for each example, [N, ...]."""

    @abstractmethod
    def probe_labels(self, input_ids: Tensor) -> Tensor:
        """Labels that examples of these tokens [N, T] may have: for measuring memory, where no data are at hand."""
