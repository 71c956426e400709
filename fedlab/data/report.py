"""The data report of a run, before it starts: what was read and kept, what was left out and why, who holds which
classes, what is there twice, what is cut. It is about raw data, so it is their owner's; no ε covers it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlab.data.corpus import Corpus
from fedlab.data.duplicates import Duplicates
from fedlab.data.partition import Shards
from fedlab.data.reading import FIRST, Reading

FORMAT = 1
WARNINGS = 5  # that are shown on a terminal; the file has all


@dataclass(frozen=True)
class DataReport:
    """What a run's data are.

    Args:
        reading: what became of the source's rows; None where it has no files.
        examples: examples kept, of them trained on, held out by clients, and in the central test split.
        clients: client → examples, held out, and classes it trains on.
        classes: of the run; 0 where labels have no names.
        duplicates: texts that are there more than once.
        cut: texts that are longer than ``max_length`` tokens.
        max_length: ``data.max_length``.
        warnings: what somebody should look at.
        content: SHA-256 of texts, labels and owners.
        deal: SHA-256 of who holds what.
        inserted: records of ``data.canaries``, at the end of the corpus.
    """

    reading: Reading | None
    examples: Mapping[str, int]
    clients: Mapping[str, Mapping[str, int]]
    classes: int
    duplicates: Duplicates
    cut: int
    max_length: int
    warnings: Sequence[str]
    content: str
    deal: str
    inserted: int = 0

    @property
    def unused(self) -> int:
        """Rows that lack nothing and are in no task, or above ``data.limit``."""
        if self.reading is None:
            return 0
        return max(0, self.reading.rows - self.reading.dropped.total() - self.examples["kept"] + self.inserted)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: ``data.json`` of a run."""
        return {
            "format": FORMAT,
            "content": self.content,
            "deal": self.deal,
            **(self.reading or Reading(rows=self.examples["kept"] - self.inserted)).to_dict(),
            "unused": self.unused,
            "examples": dict(self.examples),
            "classes": self.classes,
            "clients": {client: dict(own) for client, own in self.clients.items()},
            "duplicates": vars(self.duplicates),
            "cut": {"max_length": self.max_length, "texts": self.cut},
            "empty": 0,  # a text of no token is refused
            "warnings": list(self.warnings),
            **({"canaries": self.inserted} if self.inserted else {}),
        }

    def lines(self) -> list[str]:
        """For the terminal: one line, and one more for each thing that is not as it should be."""
        n, twice = self.examples, self.duplicates
        read = self.reading.rows if self.reading else n["kept"] - self.inserted
        found = [
            f"data: {read} rows read, {n['kept']} kept; {n['trained']} to train on, {n['test']} to test on"
            + (f", {n['held_out']} held out by clients" if n["held_out"] != n["test"] else "")
            + (f"; {self.classes} classes" if self.classes else "")
        ]
        if self.inserted:
            found.append(f"data: {self.inserted} of the records to train on are made up (data.canaries)")
        if self.reading:
            for cause, count in self.reading.dropped.items():
                places = ", ".join(self.reading.places[cause]) + (", …" if count > FIRST else "")
                found.append(f"data: {count} rows left out: {cause} ({places})")
            if self.unused:
                found.append(f"data: {self.unused} rows are not used (data.limit, or other labels than the tasks')")
            for path, why in self.reading.left_out.items():
                found.append(f"data: {path} {why}, and is not trained on")
            for column, count in self.reading.stripped.items():
                if count:
                    found.append(f"data: {count} values of column {column!r} lost white space around them")
        if twice.within or twice.across:
            found.append(
                f"data: {twice.within} training texts repeat one of the same client, {twice.across} are at several"
                " clients"
            )
        if twice.trained:
            what = (
                "left out of the scores" if twice.purged else 'scored all the same; data.duplicates = "purge" would not'
            )
            found.append(f"data: {twice.trained} held-out texts are trained on, too; {what}")
        if self.cut:
            found.append(f"data: {self.cut} texts are longer than data.max_length = {self.max_length} tokens, and cut")
        found += [f"warning: {text}" for text in self.warnings[:WARNINGS]]
        if len(self.warnings) > WARNINGS:
            found.append(f"warning: {len(self.warnings) - WARNINGS} more in data.json")
        return found


def examples_of(corpus: Corpus, tasks: Sequence[Shards]) -> dict[str, int]:
    """How many examples are there, trained on, held out by clients, and in the test split."""

    def count(parts: Sequence[np.ndarray]) -> int:
        return len(np.unique(np.concatenate(parts))) if parts else 0

    return {
        "kept": len(corpus),
        "trained": count([own for shards in tasks for own in shards.train.values()]),
        "held_out": count([own for shards in tasks for own in shards.local_test.values()]),
        "test": count([shards.test for shards in tasks]),
    }


def clients_of(corpus: Corpus, tasks: Sequence[Shards]) -> dict[str, dict[str, int]]:
    """Client → its examples, over all tasks."""
    found = {}
    for client in tasks[0].train:
        own = np.concatenate([shards.train[client] for shards in tasks])
        held = sum(len(shards.local_test[client]) for shards in tasks)
        found[client] = {"examples": len(own), "held_out": held}
        if corpus.label_names:
            found[client]["classes"] = int((corpus.label_counts(own) > 0).sum())
    return found


def content_digest(corpus: Corpus) -> str:
    """SHA-256 of every text with its label and its owner."""
    result = hashlib.sha256(corpus.label_bytes)
    for column in (list(corpus.label_names), corpus.texts, corpus.pairs or [], corpus.natural or []):
        result.update(b"\1")
        for text in column:
            result.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return result.hexdigest()


def deal_digest(tasks: Sequence[Shards]) -> str:
    """SHA-256 of who holds what, what is held out, and what is tested on."""
    result = hashlib.sha256()
    for shards in tasks:
        for half in (shards.train, shards.local_test, {"": shards.test}):
            for client, positions in half.items():
                result.update(
                    client.encode() + b"\0" + np.ascontiguousarray(positions, dtype=np.int64).tobytes() + b"\1"
                )
    return result.hexdigest()
