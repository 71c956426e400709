"""Labels that an objective cannot learn (words where it wants numbers): refused with their lines, or left out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedlab.config.data import DataSection
from fedlab.data.corpus import Corpus
from fedlab.data.reading import FIRST
from fedlab.errors import ConfigError


def fit_labels(corpus: Corpus, unfit: Callable[[str], str | None], data: DataSection) -> Corpus:
    """The corpus without the rows whose label cannot be learnt.

    Args:
        corpus: as its source gave it; the labels are as they are written.
        unfit: what is wrong with a label, in words that follow "a label that", or None.
        data: whether such rows are refused, or left out and counted (``on_bad_row``).

    Raises:
        ConfigError: names the files and lines, and quotes no row.
    """
    bad: dict[str, list[int]] = {}
    found: dict[str, str | None] = {}
    for i, label in enumerate(corpus.labels):
        if label not in found:
            found[label] = unfit(label)
        if (reason := found[label]) is not None:
            bad.setdefault(reason, []).append(i)
    if not bad:
        return corpus
    if data.on_bad_row == "drop" and corpus.reading is not None:
        for reason, rows in bad.items():
            for i in rows:
                corpus.reading.drop(f"a label that {reason}", corpus.reading.place(i))
        kept = np.setdiff1d(np.arange(len(corpus)), np.concatenate(list(bad.values())))
        return corpus.take(kept, int((kept >= len(corpus) - corpus.test).sum()))
    raise ConfigError("\n".join(_refusal(corpus, reason, rows) for reason, rows in bad.items()))


def _refusal(corpus: Corpus, reason: str, rows: list[int]) -> str:
    text = f"data: {corpus.name}: {len(rows)} of {len(corpus)} rows have a label that {reason}"
    if corpus.reading is None:
        return f"{text}; take another source, or another objective"
    places = ", ".join(corpus.reading.place(i) for i in rows[:FIRST]) + (", …" if len(rows) > FIRST else "")
    fix = 'mend them, name another column in data.label, or set data.on_bad_row = "drop" to leave such rows out'
    return f"{text} ({places}); {fix}"
