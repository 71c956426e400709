"""Tokenise once, keep the ids memory-mapped, pad a batch when it is needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlab.data.cache import cached_arrays
from fedlab.data.corpus import Corpus

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from fedlab.objectives.base import Objective

CHUNK = 4096  # texts that are tokenised at once
NO_LOSS = -100  # what sequences of labels are padded with


@dataclass(frozen=True)
class Tokens:
    """Token ids of every example, one after the other; example i is ``ids[offsets[i]:offsets[i + 1]]``.

    Args:
        ids: int32 [tokens].
        offsets: int64 [N + 1].
        labels: one number per example [N]; with ``label_offsets`` sequences, kept as ``ids`` are; None: no labels.
        types: token type ids, like ``ids``; None if the model has none.
        label_offsets: int64 [N + 1], where labels are sequences.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None
    types: np.ndarray | None = None
    label_offsets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each example."""
        return np.asarray(self.offsets[indices + 1] - self.offsets[indices])

    def label_lengths(self, indices: np.ndarray) -> np.ndarray:
        """Labels of each example where they are sequences, else 1."""
        if self.label_offsets is None:
            return np.ones(len(indices), dtype=np.int64)
        return np.asarray(self.label_offsets[indices + 1] - self.label_offsets[indices])

    def label_counts(self) -> np.ndarray:
        """Places with a loss of each example, where labels are sequences [N]."""
        assert self.labels is not None
        assert self.label_offsets is not None
        before = np.concatenate([[0], np.cumsum(self.labels != NO_LOSS)])
        return np.diff(before[self.label_offsets])

    def batch(self, indices: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` (and ``token_type_ids``), padded on the right to the longest
        [N, T]; labels are [N], or sequences padded with −100.
        """
        import torch  # here, so that data can be looked at before torch is loaded

        lengths = self.lengths(indices)
        arrays = {
            "input_ids": _padded(self.ids, self.offsets, indices, pad_id),
            "attention_mask": (np.arange(int(lengths.max())) < lengths[:, None]).astype(np.int64),
        }
        if self.labels is not None and self.label_offsets is not None:
            arrays["labels"] = _padded(self.labels, self.label_offsets, indices, NO_LOSS)
        elif self.labels is not None:
            arrays["labels"] = np.asarray(self.labels[indices])
        if self.types is not None:
            arrays["token_type_ids"] = _padded(self.types, self.offsets, indices, 0)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def label_bytes(self, indices: np.ndarray) -> bytes:
        """Labels of these examples, for a hash."""
        if self.labels is None:
            return b""
        if self.label_offsets is None:
            return np.asarray(self.labels[indices]).tobytes()
        return b"|".join(self.labels[self.label_offsets[i] : self.label_offsets[i + 1]].tobytes() for i in indices)

    def take(self, indices: np.ndarray, longest: np.ndarray) -> Tokens:
        """The examples ``indices`` [N], each cut to its first ``longest`` [N] tokens; sequences of labels likewise."""
        lengths = np.minimum(self.lengths(indices), longest)
        ids = _cut(self.ids, self.offsets, indices, lengths)
        types = None if self.types is None else _cut(self.types, self.offsets, indices, lengths)
        labels, label_offsets = self.labels, None
        if labels is not None and self.label_offsets is not None:
            counts = np.minimum(self.label_offsets[indices + 1] - self.label_offsets[indices], longest)
            labels, label_offsets = _cut(labels, self.label_offsets, indices, counts), _starts(counts)
        elif labels is not None:
            labels = labels[indices]
        return Tokens(ids, _starts(lengths), labels, types, label_offsets)


def by_length(lengths: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Positions in ``lengths`` [N] in pieces of ``size``, short ones first: texts of like length need less padding."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def tokenise(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int, objective: Objective) -> Tokens:
    """Token ids of a corpus, cut to ``max_length`` tokens, from the cache if they were made before."""
    key: dict[str, Any] = {
        "texts": _fingerprint(corpus.texts, corpus.pairs),
        "tokenizer": _identity(tokenizer),
        "max_length": max_length,
    }
    if objective.encoding:
        key |= {"encoding": objective.encoding, "labels": hashlib.sha256(corpus.label_bytes).hexdigest()}
    arrays = cached_arrays("tokens", key, lambda: _tokenise(corpus, tokenizer, max_length, objective))
    return Tokens(
        arrays["ids"],
        arrays["offsets"],
        arrays.get("labels", corpus.labels),
        arrays.get("types"),
        arrays.get("label_offsets"),
    )


def tokenise_public(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, objective: Objective
) -> Tokens:
    """Token ids of public texts, which have no labels."""
    encoded = objective.encode(texts, None, None, tokenizer, max_length)
    ids, offsets = _flat(encoded["input_ids"])
    types = _flat(encoded["token_type_ids"])[0] if "token_type_ids" in encoded else None
    return Tokens(ids, offsets, None, types)


def probe_batch(tokenizer: PreTrainedTokenizerBase, objective: Objective, rows: int, length: int) -> dict[str, Tensor]:
    """A batch of ``rows`` equal texts of at most ``length`` tokens, special ones as the tokenizer sets them, no
    padding, with labels that the objective can learn: for measuring and tracing a model where no data are at hand.
    """
    import torch

    encoded = objective.encode([" ".join(["a"] * length)], None, None, tokenizer, length)
    ids = torch.tensor(encoded["input_ids"][:1]).expand(rows, -1).contiguous()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"labels": objective.probe_labels(ids)}


def _tokenise(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int, objective: Objective
) -> dict[str, np.ndarray]:
    sequences: dict[str, list[list[int]]] = {}
    for start in range(0, len(corpus), CHUNK):
        part = slice(start, start + CHUNK)
        pairs = None if corpus.pairs is None else corpus.pairs[part]
        encoded = objective.encode(corpus.texts[part], pairs, corpus.labels[part], tokenizer, max_length)
        for name, rows in encoded.items():
            sequences.setdefault(name, []).extend(rows)
    ids, offsets = _flat(sequences["input_ids"])
    arrays = {"ids": ids, "offsets": offsets}
    if "token_type_ids" in sequences:
        arrays["types"] = _flat(sequences["token_type_ids"])[0]
    if "labels" in sequences:
        arrays["labels"], arrays["label_offsets"] = _flat(sequences["labels"])
    return arrays


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences one after the other, int32, and where each begins."""
    return (
        np.concatenate([np.array(row, dtype=np.int32) for row in rows]),
        _starts(np.array([len(row) for row in rows], dtype=np.int64)),
    )


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _cut(values: np.ndarray, offsets: np.ndarray, indices: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first ``lengths`` values of some sequences, one after the other."""
    pieces = [values[offsets[i] : offsets[i] + length] for i, length in zip(indices, lengths, strict=True)]
    return np.concatenate(pieces) if pieces else values[:0]


def _padded(values: np.ndarray, offsets: np.ndarray, indices: np.ndarray, fill: int) -> np.ndarray:
    """Sequences as rows, int64 [N, longest], filled up on the right."""
    starts, lengths = offsets[indices], offsets[indices + 1] - offsets[indices]
    rows = np.full((len(indices), int(lengths.max())), fill, dtype=np.int64)
    for row, start, length in zip(rows, starts, lengths, strict=True):
        row[:length] = values[start : start + length]
    return rows


def _fingerprint(texts: Sequence[str], pairs: Sequence[str] | None) -> str:
    result = hashlib.sha256()
    for column in (texts, pairs or []):
        for text in column:
            result.update(text.encode("utf-8", "surrogatepass") + b"\0")
        result.update(b"\1")
    return result.hexdigest()


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, not where it lies: its class, its special tokens, its chat template and, for fast ones,
    its whole serialised form. Models of one family often differ in the template alone.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        whole = json.dumps(
            {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
        )  # left behind by the last call
    else:
        whole = repr(sorted(tokenizer.get_vocab().items()))
    own = [getattr(tokenizer, "chat_template", None), tokenizer.special_tokens_map]
    whole += json.dumps(own, sort_keys=True, default=str)
    return type(tokenizer).__name__ + hashlib.sha256(whole.encode()).hexdigest()
