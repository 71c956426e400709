"""The data of a run: a corpus, dealt to clients, tokenised. ``open_data`` gives what training and evaluation read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedlab.config import RunConfig
from fedlab.config.sections import DataSection
from fedlab.config.tasks import TaskSection
from fedlab.data.cache import cached_arrays
from fedlab.data.collate import Tokens, tokenise
from fedlab.data.corpus import Corpus
from fedlab.data.partition import Shards, deal
from fedlab.data.sources import load_corpus
from fedlab.data.tasks import TaskData, one_corpus, shifted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fedlab.objectives.base import Objective


class TextTensors(Protocol):
    """A tensor for every text of a corpus: what the hidden-state cache keeps."""

    def batch(self, indices: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Those of the texts ``indices`` of so many tokens, padded on the right with zeros, [N, T, H]."""


@dataclass(frozen=True)
class FederatedData:
    """Tokens of the corpus and who holds which; all positions refer to the corpus."""

    tokens: Tokens
    shards: Shards
    hidden_states: TextTensors | None = None  # hidden states below the lowest adapter
    tasks: TaskData | None = None  # of a stream
    _fingerprints: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def clients(self) -> list[str]:
        """Client ids, in client order."""
        return list(self.shards.train)

    @property
    def test(self) -> np.ndarray:
        """Positions of the central test split."""
        return self.shards.test

    def train(self, client: str) -> np.ndarray:
        """Positions of a client's training examples."""
        return self.shards.train[client]

    def local_test(self, client: str) -> np.ndarray:
        """Positions of a client's held-out examples."""
        return self.shards.local_test[client]

    def batch(self, indices: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        """A padded batch of these examples, for an objective."""
        batch = self.tokens.batch(indices, pad_id)
        if self.hidden_states is not None:
            batch["hidden"] = self.hidden_states.batch(indices, self.tokens.lengths(indices))
        return batch

    def at(self, task: int) -> FederatedData:
        """The same texts as one task of the stream deals them, for evaluation."""
        if self.tasks is None:
            raise ValueError("these data are no stream: there is one task only")
        return replace(self, shards=self.tasks.shards[task], _fingerprints={})

    def size(self, client: str) -> int:
        """Number of a client's training examples."""
        return len(self.shards.train[client])

    def fingerprint(self, client: str) -> str:
        """SHA-256 of a client's training examples.

        Tells whoever can guess the text, so it leaves only under a keyed hash.
        """
        if client not in self._fingerprints:
            result = hashlib.sha256()
            for index in self.train(client):
                result.update(
                    self.tokens.ids[self.tokens.offsets[index] : self.tokens.offsets[index + 1]].tobytes() + b"|"
                )
            result.update(self.tokens.label_bytes(self.train(client)))
            self._fingerprints[client] = result.hexdigest()
        return self._fingerprints[client]


def corpus_and_shards(config: RunConfig) -> tuple[Corpus, Shards]:
    """Corpus and partition of a run, of a stream's task if it is one; needs no tokenizer. Read once per process."""
    if not config.tasks:
        return _corpus_and_shards(config.data.model_dump_json(), config.run.seed, config.objective.name)
    corpus, tasks = task_data(config)
    return corpus, tasks.training(
        config.stage.task if config.stage else 0, config.stream.replay, config.stream.joint, config.run.seed
    )


def task_data(config: RunConfig) -> tuple[Corpus, TaskData]:
    """The one corpus of a stream and who holds what of each task. Read once per process."""
    texts = tuple((task.name, task.labels, _of_task(config.data, task).model_dump_json()) for task in config.tasks)
    return _task_data(texts, config.stream.heads == "shared", config.run.seed, config.objective.name)


def _of_task(data: DataSection, task: TaskSection) -> DataSection:
    return DataSection.model_validate({**data.model_dump(), **task.data})


@lru_cache(maxsize=1)
def _task_data(
    tasks: tuple[tuple[str, tuple[str, ...], str], ...], shared: bool, seed: int, objective: str
) -> tuple[Corpus, TaskData]:
    sections = [DataSection.model_validate_json(text) for _, _, text in tasks]
    parts = [
        load_corpus(data, seed, labels, name, objective)
        for (name, labels, _), data in zip(tasks, sections, strict=True)
    ]
    corpus, offsets, groups = one_corpus(parts, [TaskSection(name=name) for name, _, _ in tasks], shared)
    dealt = [_dealt(part, data, seed) for part, data in zip(parts, sections, strict=True)]
    return corpus, TaskData(tuple(shifted(own, by) for own, by in zip(dealt, offsets, strict=True)), groups)


@lru_cache(maxsize=1)
def _corpus_and_shards(data_json: str, seed: int, objective: str) -> tuple[Corpus, Shards]:
    data = DataSection.model_validate_json(data_json)
    corpus = load_corpus(data, seed, objective=objective)
    return corpus, _dealt(corpus, data, seed)


def _dealt(corpus: Corpus, data: DataSection, seed: int) -> Shards:
    """The partition, from the cache on disk if another process made it."""
    settings = data.model_dump(mode="json", include={"clients", "partition", "min_client_size", "test_fraction"})
    content = hashlib.sha256(corpus.label_bytes + repr((corpus.natural, corpus.test)).encode()).hexdigest()
    return Shards.from_arrays(
        cached_arrays(
            "shards", {"labels": content, "seed": seed, **settings}, lambda: deal(corpus, data, seed).to_arrays()
        )
    )


def objective_of(config: RunConfig) -> Objective:
    """The run's objective over the labels of its corpus."""
    from fedlab.objectives import objective_class  # here: torch comes with it

    groups = task_data(config)[1].groups if config.tasks else None
    names = corpus_and_shards(config)[0].label_names
    return objective_class(config.objective.name)(names, () if groups is None else tuple(groups.tolist()))


def open_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, objective: Objective) -> FederatedData:
    """The run's data, tokenised (from the cache on disk if another run did it before)."""
    corpus, shards = corpus_and_shards(config)
    tasks = task_data(config)[1] if config.tasks else None
    return FederatedData(tokenise(corpus, tokenizer, config.data.max_length, objective), shards, tasks=tasks)
