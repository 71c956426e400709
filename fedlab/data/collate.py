"""Tokenise once, keep the ids memory-mapped, pad a batch when it is needed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlab.data.cache import cached_arrays
from fedlab.data.corpus import Corpus

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CHUNK = 4096


@dataclass(frozen=True)
class Tokens:
    """Token ids of every example, one after the other; example i is ``ids[offsets[i]:offsets[i + 1]]``."""

    ids: np.ndarray  # int32
    offsets: np.ndarray  # int64 [N + 1]
    labels: np.ndarray  # int64 [N]
    types: np.ndarray | None = None  # token type ids, like ids; None if the model has none

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each example."""
        return np.asarray(self.offsets[indices + 1] - self.offsets[indices])

    def batch(self, indices: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` (and ``token_type_ids``), padded on the right to the longest
        [N, T].
        """
        import torch  # here, so that data can be looked at before torch is loaded

        lengths = self.lengths(indices)
        width = int(lengths.max())
        input_ids = np.full((len(indices), width), pad_id, dtype=np.int64)
        types = np.zeros_like(input_ids) if self.types is not None else None
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            start = self.offsets[index]
            input_ids[row, :length] = self.ids[start : start + length]
            if types is not None and self.types is not None:
                types[row, :length] = self.types[start : start + length]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy((np.arange(width) < lengths[:, None]).astype(np.int64)),
            "labels": torch.from_numpy(np.asarray(self.labels[indices])),
        }
        return batch | ({"token_type_ids": torch.from_numpy(types)} if types is not None else {})


def tokenise(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Token ids of a corpus, cut to ``max_length`` tokens, from the cache if they were made before."""
    key = {"texts": _fingerprint(corpus), "tokenizer": _identity(tokenizer), "max_length": max_length}
    arrays = cached_arrays("tokens", key, lambda: _tokenise(corpus, tokenizer, max_length))
    return Tokens(arrays["ids"], arrays["offsets"], corpus.labels, arrays.get("types"))


def _tokenise(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, np.ndarray]:
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(corpus), CHUNK):
        stop = start + CHUNK
        pairs = None if corpus.pairs is None else corpus.pairs[start:stop]
        encoded = tokenizer(corpus.texts[start:stop], pairs, truncation=True, max_length=max_length, padding=False)
        for row, values in enumerate(encoded["input_ids"]):
            ids.append(np.array(values, dtype=np.int32))
            lengths.append(len(values))
            if "token_type_ids" in encoded:
                types.append(np.array(encoded["token_type_ids"][row], dtype=np.int32))
    arrays = {"ids": np.concatenate(ids), "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)}
    return arrays | ({"types": np.concatenate(types)} if types else {})


def _fingerprint(corpus: Corpus) -> str:
    result = hashlib.sha256()
    for texts in (corpus.texts, corpus.pairs or []):
        for text in texts:
            result.update(text.encode("utf-8", "surrogatepass") + b"\0")
        result.update(b"\1")
    return result.hexdigest()


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, not where it lies: its class and, for fast ones, its whole serialised form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        whole = json.dumps(
            {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
        )  # left behind by the last call
    else:
        whole = repr(sorted(tokenizer.get_vocab().items()))
    return type(tokenizer).__name__ + hashlib.sha256(whole.encode()).hexdigest()
