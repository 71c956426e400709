"""What every source gives: texts, each with a label as the source wrote it, which an objective then encodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Corpus:
    """A labelled corpus. Examples are referred to by their position everywhere."""

    name: str
    texts: list[str]
    labels: np.ndarray  # [N], as the objective keeps them: positions in label_names, numbers, or str; as written before
    label_names: tuple[str, ...] = ()  # () where labels have no names
    pairs: list[str] | None = None  # second sentences
    natural: list[str] | None = None  # who an example belongs to, for natural partitions
    test: int = 0  # that many examples at the end are the official test split; 0 if there is none

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def label_bytes(self) -> bytes:
        """All labels, for a hash."""
        if self.labels.dtype == object:
            return "\0".join(self.labels).encode("utf-8", "surrogatepass")
        return self.labels.tobytes()

    def take(self, positions: np.ndarray, test: int) -> Corpus:
        """The examples at ``positions``, of which the last ``test`` are the test split."""

        def pick(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[i] for i in positions]

        texts = pick(self.texts)
        assert texts is not None
        return Corpus(
            self.name, texts, self.labels[positions], self.label_names, pick(self.pairs), pick(self.natural), test
        )


def written(labels: list[str]) -> np.ndarray:
    """Labels as a source wrote them, [N] of str."""
    array = np.empty(len(labels), dtype=object)
    array[:] = labels
    return array
