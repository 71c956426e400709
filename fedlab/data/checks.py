"""What labels and lengths say against a run before it starts: refused with the fix, or warned of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlab.data.corpus import Corpus
from fedlab.data.partition import Shards
from fedlab.data.rows import alike
from fedlab.data.several import unpacked
from fedlab.errors import ConfigError

FEW_CLASSES = 10  # so many may be in ever so few examples
LEAST, ENOUGH = 3, 10  # training examples of a class on average: with fewer refused, warned of
SHOWN, LONGEST = 3, 40  # labels that are named, and their characters


def check_labels(corpus: Corpus, shards: Shards) -> list[str]:
    """What to warn of in the labels of a run, or of one task.

    Raises:
        ConfigError: nobody could learn them: classes have fewer than three examples on average, or most of them have
            one (a column of free text?); or the test split has none of the labels that are trained on.
    """
    if not corpus.label_names or not len(shards.test):
        return []
    trained = np.concatenate(list(shards.train.values()))
    counts = corpus.label_counts(trained)
    warnings = _check_number(corpus, counts[counts > 0], len(trained))
    learnt, asked = (
        {corpus.label_names[i] for i in np.flatnonzero(found)} for found in (counts, corpus.label_counts(shards.test))
    )
    if not learnt & asked:
        raise ConfigError(
            f"{corpus.name}: the test split has none of the labels that are trained on: {_some(asked)} against"
            f" {_some(learnt)}; {_cause(sorted(learnt), sorted(asked))}"
        )
    if unknown := asked - learnt:
        rows = _having(corpus, shards.test, unknown)
        warnings.append(
            f"{len(unknown)} of {len(asked)} classes of the test split are in nobody's training examples:"
            f" {_some(unknown)} ({rows} of {len(shards.test)} test examples, which nobody can learn)"
        )
    return warnings


def _having(corpus: Corpus, positions: np.ndarray, names: set[str]) -> int:
    """How many of the examples have one of these labels."""
    if corpus.several:
        return sum(not names.isdisjoint(unpacked(label)[1]) for label in corpus.labels[positions])
    return int(np.isin(corpus.labels[positions], [i for i, n in enumerate(corpus.label_names) if n in names]).sum())


def _check_number(corpus: Corpus, counts: np.ndarray, trained: int) -> list[str]:
    """``counts``: of each class that occurs in the ``trained`` examples."""
    single, few = int((counts == 1).sum()), f"{len(counts)} classes in {trained} training examples"
    if len(counts) <= FEW_CLASSES:
        return []
    if trained < LEAST * len(counts) or 2 * single > len(counts):
        raise ConfigError(
            f"{corpus.name}: {few}, {single} of them with one example: a column of free text or of numbers? Name the"
            " column of classes in data.label, or put classes together"
        )
    return [f"{few}: few examples to learn each from"] if trained < ENOUGH * len(counts) else []


def check_lengths(corpus: Corpus, lengths: np.ndarray, model: str) -> None:
    """Raise ConfigError for texts of which the tokenizer makes nothing; ``lengths`` [N] are in tokens."""
    if not (empty := np.flatnonzero(lengths == 0)).size:
        return
    first = ", ".join(str(i + 1) for i in empty[:SHOWN])
    raise ConfigError(
        f"{corpus.name}: {len(empty)} of {len(lengths)} texts are no token at all to the tokenizer of model.name ="
        f" {model!r} (kept examples {first}{', …' if len(empty) > SHOWN else ''}); remove them, or use another model"
    )


def check_said(corpus: Corpus, said: np.ndarray, model: str) -> list[str]:
    """What to warn of where examples have no token to learn; ``said`` [N] says how many each has.

    Raises ConfigError if none has any.
    """
    if said.all():
        return []
    silent = int((said == 0).sum())
    text = (
        f"{corpus.name}: {silent} of {len(said)} examples have no token to learn by the tokenizer of model.name ="
        f" {model!r} (a text of one token that does not end, or an answer of none)"
    )
    if silent == len(said):
        raise ConfigError(f"{text}; give longer texts, or use another model")
    return [f"{text}, and teach nothing"]


def check_positions(max_length: int, limit: int | None, model: str) -> None:
    """Raise ConfigError if texts may be longer than the model's table of positions."""
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"data.max_length = {max_length}, but model.name = {model!r} has positions for {limit} tokens; set"
            f" data.max_length = {limit} or less"
        )


def _cause(learnt: Sequence[str], asked: Sequence[str]) -> str:
    """Why two splits may share no label."""
    for group, why in alike([*learnt, *asked]):
        if set(group) & set(learnt) and set(group) & set(asked):
            return f"{' and '.join(map(repr, group))} {why}: write labels alike in both"
    return "another column, or another coding of the classes? Write labels alike in both"


def _some(labels: set[str]) -> str:
    names = sorted(labels, key=lambda name: (len(name), name))[:SHOWN]
    shown = ", ".join(repr(name if len(name) <= LONGEST else f"{name[:LONGEST]}…") for name in names)
    return shown + (", …" if len(labels) > SHOWN else "")
