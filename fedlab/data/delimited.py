"""CSV and TSV, read strictly (RFC 4180): a row of another width, a quote that does not close, another delimiter than
the file's name says are refused with their line.

The one thing that strictness alone does not see is a stray quote that a later one happens to close: the lines between
them would be one field. Such a field is recognised by its lines, which are rows of their own.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlab.data.table import Table, check_names, refuse

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
SUFFIX = {",": ".csv", "\t": ".tsv"}
QUOTE = "'\"'"


@dataclass(frozen=True)
class _Rows:
    """Records, and the lines that each began and ended on, from 1."""

    fields: list[list[str]]
    first: list[int]
    last: list[int]
    problem: tuple[int, str] | None = None  # the record that could not be read began here; why


def read_delimited(path: Path, text: str, delimiter: str, coded: Sequence[str]) -> Table:
    """The table of a csv or tsv file.

    Args:
        path: the file.
        text: what it holds.
        delimiter: a comma or a tab.
        coded: columns with few different values (labels, owners), by which rows inside a field are recognised.

    Raises:
        ConfigError: for the first line that cannot be read in one way only.
    """
    lines = list(io.StringIO(text, newline=""))
    rows = _parsed(lines, delimiter)
    if not rows.fields:
        where, cause = rows.problem or (None, "has no header: the file is empty")
        refuse(path, cause, where)
    names = [name.strip() for name in rows.fields[0]]
    _check_delimiter(path, names, delimiter)
    check_names(path, names)
    swallowed = _swallowed(rows, names, lines, delimiter, coded) if rows.problem is None else None
    if rows.problem is not None or swallowed is not None:
        plain = _unquoted(lines, delimiter, len(names)) if delimiter == "\t" else None
        if plain is None:
            where, cause = rows.problem or (swallowed, f"a quote {QUOTE} opens a field that holds rows of its own")
            fix = f"write {QUOTE} twice inside a field in quotes, or use JSON lines or Parquet"
            refuse(path, f"{cause}; {fix}", where)
        rows = plain
    for fields, line in zip(rows.fields, rows.first, strict=True):
        if len(fields) != len(names):
            refuse(
                path,
                f"{len(fields)} field(s), but the header has {len(names)}; put quotes around a field that holds a"
                f" {'tab' if delimiter == chr(9) else 'comma'} or a line break, or use JSON lines or Parquet",
                line,
            )
    columns = {name: [fields[i] for fields in rows.fields[1:]] for i, name in enumerate(names)}
    return Table(path, names, {name: list(values) for name, values in columns.items()}, rows.first[1:])


def _parsed(lines: Sequence[str], delimiter: str) -> _Rows:
    """Records up to the first that breaks the grammar; empty lines are no records."""
    rows = _Rows([], [], [])
    before = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    began = 1
    try:
        for fields in reader:
            if fields:
                rows.fields.append(fields)
                rows.first.append(began)
                rows.last.append(reader.line_num)
            began = reader.line_num + 1
    except csv.Error as error:
        open_quote = "unexpected end" in str(error)
        cause = "is never closed" if open_quote else f"is followed by more text, on line {reader.line_num}"
        problem = f"a quote {QUOTE} opens a field and {cause}" if '"' in "".join(lines[began - 1 :]) else str(error)
        return _Rows(rows.fields, rows.first, rows.last, (began, problem))
    finally:
        csv.field_size_limit(before)
    return rows


def _check_delimiter(path: Path, names: Sequence[str], delimiter: str) -> None:
    """Raise ConfigError where the header is one name that another delimiter parts."""
    if len(names) > 1:
        return
    other = next((sign for sign in DELIMITERS if sign != delimiter and sign in names[0]), None)
    if other is None:
        return
    fix = f"call it {SUFFIX[other]}" if other in SUFFIX else f"write it with {DELIMITERS[delimiter]}"
    refuse(path, f"is separated by {DELIMITERS[other]} ({other!r}), not by {DELIMITERS[delimiter]}; {fix}", 1)


def _swallowed(
    rows: _Rows, names: Sequence[str], lines: Sequence[str], delimiter: str, coded: Sequence[str]
) -> int | None:
    """The first line of a record that swallowed others, or None.

    It has several lines, of which at least half would be rows of the table with labels and owners that others have; or
    just rows of it, where it has more lines than the table has others to compare with.
    """
    known = [(names.index(name), set[str]()) for name in coded if name in names]
    for position, values in known:
        values.update(fields[position].strip() for fields in rows.fields[1:] if len(fields) == len(names))
    others = len(rows.fields) - 2  # beside the header and the one that is looked at
    for first, last in zip(rows.first, rows.last, strict=True):
        if not known or first == last:
            continue
        inner = [line.rstrip("\r\n").split(delimiter) for line in lines[first - 1 : last - 1]]
        told = known if others >= len(inner) else []
        alike = sum(len(own) == len(names) and all(own[i].strip(' "') in values for i, values in told) for own in inner)
        if 2 * alike >= len(inner):
            return first
    return None


def _unquoted(lines: Sequence[str], delimiter: str, width: int) -> _Rows | None:
    """The file read as one whose quotes are text like any other, as many tsv files are; None unless it is one: every
    line is a row, and no field stands in quotes.
    """
    rows = _Rows([], [], [])
    for number, line in enumerate(lines, 1):
        if not (content := line.rstrip("\r\n")):
            continue
        fields = content.split(delimiter)
        if len(fields) != width or any(len(own) > 1 and own[0] == own[-1] == '"' for own in fields):
            return None
        rows.fields.append(fields)
        rows.first.append(number)
        rows.last.append(number)
    return rows
