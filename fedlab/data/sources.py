"""Where text comes from: one line per source.

A source is added in three places: its file, its line in ``SOURCES``, and its name in ``DataSection.source``
(``fedlab.config.data``, which imports nothing of this).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedlab.config.data import DataSection
from fedlab.data import docstrings, pairs, tables, wordnet
from fedlab.data.corpus import Corpus
from fedlab.data.rows import numeric_labels, warnings_of
from fedlab.data.table import shown
from fedlab.data.tasks import with_labels
from fedlab.data.unfit import fit_labels
from fedlab.errors import ConfigError
from fedlab.seeds import random_stream


@dataclass(frozen=True)
class Source:
    """How the examples of one kind of source are had."""

    load: Callable[[DataSection], Corpus]
    check: Callable[[DataSection], None]  # raises ConfigError if the data cannot be there; reads nothing
    keys: frozenset[str] = frozenset()  # of [data], those that not every source reads
    columns: bool = False  # whether examples have columns, one of which may name the client
    local: bool = True  # whether data.path is a place on this machine's disk
    files: Callable[[DataSection], list[tuple[str, Path]]] = lambda data: []  # (split, file) of all that is read
    place: Callable[[DataSection], str | None] = lambda data: data.path  # where its records are
    subset: str | None = None  # what is read where data.subset is left out


SOURCES: dict[str, Source] = {
    "docstrings": Source(docstrings.load, docstrings.check),
    "wordnet": Source(
        wordnet.load, wordnet.check, wordnet.KEYS, files=wordnet.files, place=wordnet.place, subset=wordnet.PARTS[0]
    ),
    "code": Source(pairs.load_code, pairs.check_code, columns=True),
    "definitions": Source(
        pairs.load_definitions,
        pairs.check_definitions,
        wordnet.KEYS,
        columns=True,
        files=wordnet.files,
        place=wordnet.place,
        subset=wordnet.PARTS[0],
    ),
    "files": Source(tables.load_files, tables.check_files, tables.FILES_KEYS, columns=True, files=tables.source_files),
    "hub": Source(tables.load_hub, tables.check_hub, tables.HUB_KEYS, columns=True, local=False),
}


def check_source(data: DataSection) -> None:
    """Raise ConfigError if the data cannot be there, or a key is given that this source does not read.

    Cheap: looks at names and files, reads nothing, imports nothing heavy.
    """
    source = SOURCES[data.source]
    if data.partition.kind == "natural" and not source.columns:
        raise ConfigError(
            f'data.partition = natural needs a column that names the client; data.source = "{data.source}" has no'
            " columns"
        )
    for key in sorted(frozenset().union(*(one.keys for one in SOURCES.values())) - source.keys):
        if getattr(data, key) != DataSection.model_fields[key].default:
            readers = " and ".join(f'"{name}"' for name, one in SOURCES.items() if key in one.keys)
            raise ConfigError(
                f'data.{key} = {getattr(data, key)!r} is not read by data.source = "{data.source}", only by {readers};'
                " remove it"
            )
    source.check(data)


def identity(data: DataSection) -> str:
    """Where the records are, whoever holds them: what makes two runs runs on the same data.

    Another spelling of a path, a link to it, or a key that this source does not read makes no other place; nor do
    growth and another assignment, which ``fedlab.privacy.ledger.records`` watches.
    """
    source = SOURCES[data.source]
    place = source.place(data)
    if place is not None and (source.local or Path(place).exists()):
        place = str(Path(place).expanduser().resolve())
    elif place is not None:
        place = place.strip("/").lower()  # ids of the hub ignore case
    subset = (data.subset or source.subset) if "subset" in source.keys else None
    split = data.split if "split" in source.keys else DataSection.model_fields["split"].default
    return json.dumps([data.source, place, subset, split])


def load_corpus(
    data: DataSection, seed: int, labels: tuple[str, ...] = (), task: str = "", objective: str = "classification"
) -> Corpus:
    """The corpus of a configuration as its objective keeps the labels, or of one ``task`` of a stream, with only its
    ``labels``.

    ``data.limit`` keeps a seeded choice of the training examples and the whole test split.
    """
    from fedlab.objectives import objective_class  # here: torch comes with it

    learnt = objective_class(objective)
    data = learnt.columns(data)
    source = SOURCES[data.source].load(data)
    if source.reading is not None and source.reading.lists and not learnt.several:
        column, place = next(iter(source.reading.lists.items()))
        raise ConfigError(
            f"{place}: column {shown([column])} holds a list, want text, a number or true/false; objective.name ="
            ' "multi-label" learns lists'
        )
    source = fit_labels(source, learnt.unfit, data)
    if learnt.named and source.reading is not None and data.label is not None:
        written = source.labels.tolist()
        source.reading.warnings += warnings_of(written, "label", data.label, numeric_labels(written))
    values, names = learnt.encode_labels(source.labels.tolist(), source.label_names, source.name)
    corpus = with_labels(replace(source, labels=values, label_names=names), labels, task)
    if task:
        learnt.check_labels(corpus.label_names, corpus.name)
    trainable = len(corpus) - corpus.test
    if data.limit is None or data.limit >= trainable:
        return corpus
    kept = np.sort(random_stream(seed, "limit").choice(trainable, data.limit, replace=False))
    return corpus.take(np.concatenate([kept, np.arange(trainable, len(corpus))]), corpus.test)
