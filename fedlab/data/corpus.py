"""What every source gives: texts, each with a label as the source wrote it, which an objective then encodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedlab.data.reading import Reading
from fedlab.data.several import unpacked
from fedlab.errors import LabelError


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
    reading: Reading | None = None  # what was read for it; None where a source has no rows that could be left out

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def several(self) -> bool:
        """Whether an example has any number of labels (``fedlab.data.several``)."""
        return bool(self.label_names) and self.labels.dtype == object

    def label_counts(self, positions: np.ndarray) -> np.ndarray:
        """How many of the examples have each label, [names]; () where labels have no names."""
        if not self.label_names:
            return np.zeros(0, dtype=np.int64)
        if not self.several:
            return np.bincount(self.labels[positions], minlength=len(self.label_names))
        number = {name: i for i, name in enumerate(self.label_names)}
        held = [number[name] for label in self.labels[positions] for name in unpacked(label)[1]]
        return np.bincount(np.array(held, dtype=np.int64), minlength=len(number))

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
        return replace(
            self,
            texts=texts,
            labels=self.labels[positions],
            pairs=pick(self.pairs),
            natural=pick(self.natural),
            test=test,
        )


def renumbered(corpus: Corpus, names: tuple[str, ...]) -> Corpus:
    """The corpus with labels as positions in ``names``; as it is where they are its own, or none.

    Raises LabelError for a label that is not among them.
    """
    if not names or names == corpus.label_names:
        return corpus
    if not corpus.label_names:
        raise LabelError(f"objective.labels names {len(names)}, but the labels of {corpus.name} have no names")
    if unknown := [name for name in corpus.label_names if name not in names]:
        raise LabelError(
            f"data: {corpus.name} has the label {unknown[0]!r}, which is not among the {len(names)} of objective.labels"
        )
    if corpus.several:
        return replace(corpus, label_names=names)
    position = {name: i for i, name in enumerate(names)}
    numbers = np.array([position[name] for name in corpus.label_names], dtype=corpus.labels.dtype)
    return replace(corpus, labels=numbers[corpus.labels], label_names=names)


def written(labels: list[str]) -> np.ndarray:
    """Labels as a source wrote them, [N] of str."""
    array = np.empty(len(labels), dtype=object)
    array[:] = labels
    return array
