"""What was read of a source, what was left out of it and why: the first part of a run's data report."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

FIRST = 3  # places of a kind that are named


@dataclass(frozen=True)
class SourceFile:
    """One file, as it was when it was read."""

    path: str
    rows: int
    bytes: int
    sha256: str
    split: str = "train"


@dataclass
class Reading:
    """What became of a source's rows.

    Args:
        files: that were read.
        left_out: files in the training directory that were not, with the reason.
        rows: rows of all files.
        dropped: cause → rows that were left out.
        places: cause → where the first of them are.
        stripped: column → values that lost surrounding white space.
        warnings: what somebody should look at.
        kept: file, unit and line numbers of the rows that were kept of it, in the order of the examples.
        lists: column → where the first list of several values is.
    """

    files: list[SourceFile] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    stripped: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    kept: list[tuple[str, str, list[int]]] = field(default_factory=list)
    lists: dict[str, str] = field(default_factory=dict)

    def drop(self, cause: str, place: str) -> None:
        """Count a row that is left out."""
        self.dropped[cause] += 1
        if len(named := self.places.setdefault(cause, [])) < FIRST:
            named.append(place)

    def place(self, example: int) -> str:
        """Where an example was read, as the source gave it."""
        for file, unit, lines in self.kept:
            if example < len(lines):
                return f"{file}: {unit} {lines[example]}"
            example -= len(lines)
        raise IndexError(f"no row was kept for example {example} beyond the last")

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        return {
            "files": [vars(file) for file in self.files],
            "left_out": self.left_out,
            "rows": self.rows,
            "dropped": {cause: {"rows": n, "first": self.places[cause]} for cause, n in self.dropped.items()},
            "stripped": dict(self.stripped),
        }


def joined(readings: list[Reading]) -> Reading:
    """What was read for several tasks, as one; files that several read are named once."""
    whole = Reading()
    for one in readings:
        whole.warnings += [text for text in one.warnings if text not in whole.warnings]
        if one.files and all(file in whole.files for file in one.files):
            continue  # another task of the same files
        whole.files += [file for file in one.files if file not in whole.files]
        whole.left_out |= one.left_out
        whole.rows += one.rows
        whole.dropped += one.dropped
        whole.stripped += one.stripped
        for cause, places in one.places.items():
            whole.places[cause] = [*whole.places.get(cause, []), *places][:FIRST]
    return whole
