"""Where text comes from: one line per source."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedlab.config.sections import DataSection
from fedlab.data import docstrings, tables, wordnet
from fedlab.data.corpus import Corpus
from fedlab.data.tasks import with_labels
from fedlab.errors import ConfigError
from fedlab.seeds import random_stream

SOURCES: dict[str, Callable[[DataSection], Corpus]] = {
    "docstrings": lambda data: docstrings.load(),
    "wordnet": lambda data: wordnet.load(data.path, data.subset),
    "files": tables.load_files,
    "hub": tables.load_hub,
}


def check_source(data: DataSection) -> None:
    """Raise ConfigError if the data cannot be there.

    Cheap: looks at names and files, reads nothing, imports nothing heavy.
    """
    if data.partition.kind == "natural" and data.source in ("docstrings", "wordnet"):
        raise ConfigError(
            f'data.partition = natural needs a column that names the client; data.source = "{data.source}" has no'
            " columns"
        )
    if data.source == "docstrings":
        docstrings.check()
    elif data.source == "wordnet":
        wordnet.find(data.path, wordnet.parts_of(data.subset))
    elif data.source == "files":
        tables.check_files(data)
    elif data.path is None:
        raise ConfigError('data.source = "hub" needs data.path: the id of a data set, for example "nyu-mll/glue"')


def identity(data: DataSection) -> str:
    """Where the text is from, whoever is dealt it: what makes two runs runs on the same data.

    Growing or re-dealing it changes nothing.
    """
    place = str(Path(data.path).absolute()) if data.path and data.source != "hub" else data.path
    return json.dumps([data.source, place, data.subset, data.split])


def load_corpus(
    data: DataSection, seed: int, labels: tuple[str, ...] = (), task: str = "", objective: str = "classification"
) -> Corpus:
    """The corpus of a configuration as its objective keeps the labels, or of one ``task`` of a stream, with only its
    ``labels``.

    ``data.limit`` keeps a seeded choice of the training examples and the whole test split.
    """
    from fedlab.objectives import objective_class  # here: torch comes with it

    learnt, source = objective_class(objective), SOURCES[data.source](data)
    values, names = learnt.encode_labels(source.labels.tolist(), source.label_names, source.name)
    corpus = with_labels(replace(source, labels=values, label_names=names), labels, task)
    learnt.check_labels(corpus.label_names, corpus.name)
    trainable = len(corpus) - corpus.test
    if data.limit is None or data.limit >= trainable:
        return corpus
    kept = np.sort(random_stream(seed, "limit").choice(trainable, data.limit, replace=False))
    return corpus.take(np.concatenate([kept, np.arange(trainable, len(corpus))]), corpus.test)
