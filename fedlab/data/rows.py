"""From tables to a corpus: labels, owners and texts as they are written, and what becomes of rows that lack one.

Labels and owners lose surrounding white space. A row without a label, a text or an owner is refused, or left out and
counted (``data.on_bad_row``); nothing vanishes unsaid.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlab.config.data import DataSection
from fedlab.data.conversations import conversations
from fedlab.data.corpus import Corpus, written
from fedlab.data.reading import FIRST, Reading
from fedlab.data.table import Column, Table, check_text, shown
from fedlab.errors import ConfigError

NOT_A_NUMBER = ("nan", "<na>")  # in any case; what tables write for "no value" and nobody calls a class
NO_VALUE = ("na", "n/a", "#n/a", "null", "none", "nil")  # likewise where all other labels are numbers
UNLABELLED = "unlabelled (−1 at the hub)"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are what.

    Args:
        texts: one or two, of which the second may be context; conversations are one.
        label: None where nothing but the text is learnt.
        owner: names the client; None where none does.
        conversations: whether the text column holds lists of messages.
        context: whether the second text may be empty.
    """

    texts: Sequence[str]
    label: str | None
    owner: str | None
    conversations: bool = False
    context: bool = False

    @property
    def needed(self) -> Sequence[str]:
        """Text columns that must hold something."""
        return self.texts[:1] if self.context else self.texts

    @property
    def all(self) -> list[str]:
        """Their names."""
        return list(dict.fromkeys([*self.texts, *self.coded]))

    @property
    def coded(self) -> list[str]:
        """Those of few different values."""
        return [column for column in (self.label, self.owner) if column]

    @property
    def nested(self) -> str | None:
        """The column that may hold lists and objects."""
        return self.texts[0] if self.conversations else None


def columns_of(data: DataSection, texts: Sequence[str], label: str | None) -> Columns:
    """The columns of a configuration; ``texts`` and ``label`` unless there are whole conversations.

    Raises ConfigError for none or three columns of text.
    """
    owner = data.partition.column
    if data.messages is not None:
        return Columns([data.messages], None, owner, conversations=True)
    if not 1 <= len(texts) <= 2:
        raise ConfigError(f"data.text = {list(texts)}: want one text column, or two for sentence pairs")
    if data.context is not None:
        return Columns([*texts, data.context], label, owner, context=True)
    return Columns(texts, label, owner)


def corpus_of(
    name: str,
    splits: Sequence[Sequence[Table]],
    columns: Columns,
    data: DataSection,
    reading: Reading,
    label_names: tuple[str, ...] = (),
    unlabelled: str | None = None,
) -> Corpus:
    """One corpus of the tables of one or two splits, of which the second is the test split; nobody owns that.

    Args:
        name: of the source, for errors.
        splits: tables of each.
        columns: what they hold.
        data: what to do with rows that lack something.
        reading: is filled.
        label_names: the source's own order of its labels.
        unlabelled: what the source writes where there is no label; such rows are left out.

    Raises:
        ConfigError: a column is not there; a row lacks something, unless such rows are to be left out.
    """
    named = columns.label
    numeric = named is not None and numeric_labels(
        [value for split in splits for table in split for value in table.columns.get(named, [])]
    )
    texts, labels, owners = [list[str]() for _ in columns.texts], list[str](), list[str]()
    sizes, bad = list[int](), list[str]()
    for test, tables in enumerate(splits):
        own = replace(columns, owner=None) if test else columns
        for table in tables:
            _check_there(table, own)
            if own.conversations and table.columns:
                table.columns[own.texts[0]] = conversations(table, own.texts[0])
            kept, problems = _kept(table, own, numeric, reading, unlabelled, data.on_bad_row == "drop")
            bad += problems
            reading.kept.append((table.path.name, table.unit, [table.lines[i] for i in kept]))
            for column, at in table.lists.items():
                reading.lists.setdefault(column, f"{str(table.path)!r}, {table.unit} {at}")
            for values, column in zip(texts, own.texts, strict=True):
                values += [table.columns[column][i] or "" for i in kept]
            labels += (
                _stripped(table.columns.get(own.label, []), kept, own.label, reading) if own.label else [""] * len(kept)
            )
            owners += (
                _stripped(table.columns.get(own.owner, []), kept, own.owner, reading) if own.owner else [""] * len(kept)
            )
        sizes.append(len(labels) - sum(sizes))
        reading.rows += sum(map(len, tables))
    if bad:
        fix = 'fill them in, or set data.on_bad_row = "drop" to leave such rows out'
        raise ConfigError("\n".join(bad) + f"\n{fix}")
    if columns.owner:
        reading.warnings += warnings_of(owners[: sizes[0]], "owner", columns.owner, True)
    return Corpus(
        name,
        texts[0],
        written(labels),
        label_names,
        texts[1] if len(texts) == 2 else None,
        owners if columns.owner else None,
        sizes[1] if len(sizes) == 2 else 0,
        reading,
    )


def _check_there(table: Table, columns: Columns) -> None:
    for column in columns.all:
        if column not in table.names and (table.names or len(table)):  # a file of no rows may have no columns
            raise ConfigError(f"column {column!r} is not in {str(table.path)!r}; it has {shown(table.names, str)}")


def _kept(
    table: Table, columns: Columns, numeric: bool, reading: Reading, unlabelled: str | None, drop: bool
) -> tuple[list[int], list[str]]:
    """Rows of a table that lack nothing, and what is wrong with the others unless they are to be dropped."""
    kept: list[int] = []
    lacking: dict[str, list[int]] = {}
    for column in columns.all:
        for value, line in zip(table.columns.get(column, []), table.lines, strict=True):
            check_text(table.path, column, value, line, table.unit)
    tests = [(columns.label, "label")] if columns.label else []
    tests += [(c, "text") for c in columns.needed] + ([(columns.owner, "owner")] if columns.owner else [])
    for i in range(len(table)):
        if unlabelled is not None and columns.label and table.columns[columns.label][i] == unlabelled:
            reading.drop(UNLABELLED, f"{table.path.name}: {table.unit} {table.lines[i]}")
            continue
        gap = next((column for column, what in tests if is_gap(table.columns[column][i], what, numeric)), None)
        if gap is None:
            kept.append(i)
        elif drop:
            what = next(what for column, what in tests if column == gap)
            reading.drop(f"no {what} in column {gap!r}", f"{table.path.name}: {table.unit} {table.lines[i]}")
        else:
            lacking.setdefault(gap, []).append(i)
    if drop:
        return kept, []
    return kept, [_lack(table, column, rows, columns) for column, rows in lacking.items()]


def _lack(table: Table, column: str, rows: Sequence[int], columns: Columns) -> str:
    what = {columns.label: "the label", columns.owner: "which names the client"}.get(column, "the text")
    places = ", ".join(str(table.lines[i]) for i in rows[:FIRST]) + (", …" if len(rows) > FIRST else "")
    what = "the conversation" if columns.conversations and column == columns.texts[0] else what
    return (
        f"{str(table.path)!r}: {len(rows)} of {len(table)} rows have nothing in column {column!r}, {what}"
        f" ({table.unit} {places})"
    )


def is_gap(value: str | None, what: str, numeric: bool) -> bool:
    """Whether a row has no value: null, NaN, or nothing that can be seen.

    Args:
        value: as it is written.
        what: "label", "owner" or "text"; a text may say "nan".
        numeric: whether all other labels are numbers; then "NA" and "null" are none.
    """
    if value is None or not value.strip() or not any(map(_visible, value)):
        return True
    plain = value.strip().lower()
    return what != "text" and (plain in NOT_A_NUMBER or (what == "label" and numeric and plain in NO_VALUE))


def _visible(sign: str) -> bool:
    """Whether a character is more than space, control or format: a text of none has nothing to tokenise."""
    kind = unicodedata.category(sign)
    return kind[0] != "Z" and kind not in ("Cc", "Cf", "Cs")


def _stripped(values: Column, kept: Sequence[int], column: str, reading: Reading) -> list[str]:
    found = []
    for i in kept:
        value = values[i] or ""
        found.append(value.strip())
        if found[-1] != value:
            reading.stripped[column] += 1
    return found


def numeric_labels(values: Sequence[str | None]) -> bool:
    """Whether all labels but those that may stand for nothing are numbers."""
    plain = {value.strip().lower() for value in set(values) if value}
    rest = plain - {"", *NOT_A_NUMBER, *NO_VALUE}
    return bool(rest) and all(map(is_number, rest))


def is_number(text: str) -> bool:
    """Whether a text reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def warnings_of(values: Sequence[str], what: str, column: str, numeric: bool) -> list[str]:
    """What may be wrong with labels or owners that are kept as they are written."""
    counts = Counter(values)
    found = [
        f"{what}s {' and '.join(map(repr, group))} of column {column!r} {why}, and are kept apart"
        for group, why in alike(list(counts))
    ]
    if not numeric:
        odd = [value for value in counts if value.lower() in NO_VALUE]
        found += [
            f"{what} {value!r} of column {column!r} ({counts[value]} rows) is kept as it is written; if it means that"
            " there is none, leave the field empty"
            for value in odd
        ]
    return found


def alike(values: Sequence[str]) -> list[tuple[list[str], str]]:
    """Groups of values that look alike, each with the reason: case, Unicode normalisation, white space within, or a
    number written as integer and as fraction.
    """
    folded: dict[str, list[str]] = {}
    for value in values:
        plain = unicodedata.normalize("NFKC", value).casefold()
        seen = "".join(sign for sign in plain if unicodedata.category(sign) != "Cf")
        folded.setdefault(" ".join(seen.split()), []).append(value)
    found = [(group, "differ only in case, white space or Unicode form") for group in folded.values() if len(group) > 1]
    numbers: dict[str, list[str]] = {}
    for value in values:
        whole, point, rest = value.partition(".")
        if point and whole.removeprefix("-").isdecimal() and not rest.strip("0"):
            numbers.setdefault(whole, []).append(value)
    known = set(values)
    found += [([whole, *own], "are one number") for whole, own in numbers.items() if whole in known]
    return found
