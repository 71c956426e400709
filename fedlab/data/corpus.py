"""What every source gives: texts with integer labels, and the names of the labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """A labelled corpus. Examples are referred to by their position everywhere."""

    name: str
    texts: list[str]
    labels: np.ndarray  # int64 [N], positions in label_names
    label_names: tuple[str, ...]
    pairs: list[str] | None = None  # second sentences
    natural: list[str] | None = None  # who an example belongs to, for natural partitions
    test: int = 0  # that many examples at the end are the official test split; 0 if there is none

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, positions: np.ndarray, test: int) -> Corpus:
        """The examples at ``positions``, of which the last ``test`` are the test split."""

        def pick(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[i] for i in positions]

        texts = pick(self.texts)
        assert texts is not None
        return Corpus(
            self.name, texts, self.labels[positions], self.label_names, pick(self.pairs), pick(self.natural), test
        )


def encode_labels(values: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label strings → positions in their sorted names; integers sort as numbers, so that 0…K−1 keep their positions."""
    distinct = set(values)
    numeric = all(value.removeprefix("-").isdecimal() for value in distinct)
    names = tuple(sorted(distinct, key=(lambda value: (int(value), value)) if numeric else None))
    position = {name: i for i, name in enumerate(names)}
    return np.array([position[v] for v in values], dtype=np.int64), names
