"""The data of a run: a corpus, dealt to clients, tokenised. ``open_data`` gives what training and evaluation read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fedlab.config import RunConfig
from fedlab.data.cache import cached_arrays
from fedlab.data.collate import Tokens, tokenise
from fedlab.data.corpus import Corpus
from fedlab.data.partition import Shards, deal
from fedlab.data.sources import load_corpus
from fedlab.sections import DataSection

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fedlab.prefix import Prefix


@dataclass(frozen=True)
class FederatedData:
    """Tokens of the corpus and who holds which; all positions refer to the corpus."""

    tokens: Tokens
    shards: Shards
    label_names: tuple[str, ...]
    prefix: Prefix | None = None  # hidden states below the lowest adapter
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
        """A padded batch of these examples for ``LoadedModel.logits``."""
        batch = self.tokens.batch(indices, pad_id)
        if self.prefix is not None:
            batch["hidden"] = self.prefix.batch(indices, self.tokens.lengths(indices))
        return batch

    def size(self, client: str) -> int:
        """Number of a client's training examples."""
        return len(self.shards.train[client])

    def fingerprint(self, client: str) -> str:
        """SHA-256 of a client's training examples. Tells whoever can guess the text, so it leaves only under a keyed hash."""
        if client not in self._fingerprints:
            result = hashlib.sha256()
            for index in self.train(client):
                result.update(self.tokens.ids[self.tokens.offsets[index] : self.tokens.offsets[index + 1]].tobytes() + b"|")
            result.update(np.asarray(self.tokens.labels[self.train(client)]).tobytes())
            self._fingerprints[client] = result.hexdigest()
        return self._fingerprints[client]


def corpus_and_shards(config: RunConfig) -> tuple[Corpus, Shards]:
    """Corpus and partition of a run; needs no tokenizer. Read once per process."""
    return _corpus_and_shards(config.data.model_dump_json(), config.run.seed)


@lru_cache(maxsize=1)
def _corpus_and_shards(data_json: str, seed: int) -> tuple[Corpus, Shards]:
    data = DataSection.model_validate_json(data_json)
    corpus = load_corpus(data, seed)
    settings = data.model_dump(mode="json", include={"clients", "partition", "min_client_size", "test_fraction"})
    content = hashlib.sha256(corpus.labels.tobytes() + repr((corpus.natural, corpus.test)).encode()).hexdigest()
    arrays = cached_arrays("shards", {"labels": content, "seed": seed, **settings}, lambda: deal(corpus, data, seed).to_arrays())
    return corpus, Shards.from_arrays(arrays)


def open_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> FederatedData:
    """The run's data, tokenised (from the cache on disk if another run did it before)."""
    corpus, shards = corpus_and_shards(config)
    return FederatedData(tokenise(corpus, tokenizer, config.data.max_length), shards, corpus.label_names)
