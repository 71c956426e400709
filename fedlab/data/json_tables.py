"""JSON: one object per row, either one after another (JSON lines) or in one array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlab.data.table import Column, Table, canonical, listed, refuse, shown, structured

_SPACE = re.compile(r"[ \t\r\n]*")
Row = dict[str, Any]


class _Twice(ValueError):
    """A key that an object has twice."""


def read_json(
    path: Path, text: str, wanted: Sequence[str] | None, nested: str | None = None, lists: str | None = None
) -> Table:
    """The table of a json or jsonl file; a key that an object lacks has no value there.

    Args:
        path: the file.
        text: what it holds.
        wanted: columns to keep; None for all.
        nested: the column whose lists and objects are kept, as JSON.
        lists: the column whose lists of single values are kept, as JSON.

    Raises:
        ConfigError: at the first line that is no object, or has a list or an object for a value that is wanted.
    """
    rows: list[Row] = []
    lines: list[int] = []
    names: dict[str, None] = {}
    for row, line in _objects(path, text):
        rows.append(row)
        lines.append(line)
        names.update(dict.fromkeys(row))
    kept = [name for name in names if wanted is None or name in wanted]
    unit = "row" if text.lstrip(" \t\r\n").startswith("[") else "line"
    if unit == "row":  # of an array, which may be all on one line
        lines = list(range(1, len(rows) + 1))
    found = {name: at for name in kept if name == lists and (at := _as_text(name, rows, lines)) is not None}
    counted = unit if wanted is not None else ""
    columns = {name: _column(path, name, rows, lines, counted, name == nested) for name in kept}
    return Table(path, list(names), columns, lines, unit, found)


def _as_text(name: str, rows: Sequence[Row], lines: Sequence[int]) -> int | None:
    """Put JSON in the place of lists of single values under one key; the line of the first, None if there is none."""
    first = None
    for row, line in zip(rows, lines, strict=True):
        if isinstance(values := row.get(name), list):
            first = first or line
            row[name] = listed(values) or values
    return first


def _column(path: Path, name: str, rows: Sequence[Row], lines: Sequence[int], unit: str, nested: bool) -> Column:
    """Values of one key; lists and objects are refused where a ``unit`` says what is counted, else left out."""
    values: Column = []
    for row, line in zip(rows, lines, strict=True):
        value = row.get(name)
        if isinstance(value, dict | list):
            if unit and not nested:
                kind = "an object" if isinstance(value, dict) else "a list"
                refuse(path, f"column {shown([name])} holds {kind}, want text, a number or true/false", line, unit)
            value = structured(value) if nested else None
        values.append(value if value is None or isinstance(value, str) else canonical(value))
    return values


def _pairs(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"an object has the key {shown([next(n for n in names if names.count(n) > 1)])} twice; keep one")
    return row


def _objects(path: Path, text: str) -> Iterator[tuple[Row, int]]:
    """Every object with the line that it begins on."""
    decoder = json.JSONDecoder(object_pairs_hook=_pairs)
    at = _past_space(text, 0)
    array = text.startswith("[", at)
    if array:
        at = _past_space(text, at + 1)
    line, counted, first = 1, 0, True
    while at < len(text) and not (array and text[at] == "]"):
        if array and not first:
            if text[at] != ",":
                refuse(path, "no valid JSON: want ',' or ']' after an object", text.count("\n", 0, at) + 1)
            at = _past_space(text, at + 1)
        line, counted, first = line + text.count("\n", counted, at), at, False
        try:
            row, after = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            refuse(path, f"no valid JSON: {error.msg}", text.count("\n", 0, error.pos) + 1)
        except (_Twice, RecursionError, ValueError) as error:
            refuse(
                path, str(error) if isinstance(error, _Twice) else "values that are nested or written too long", line
            )
        if not isinstance(row, dict):
            refuse(path, 'want an object per row, as {"text": "…", "label": "…"}', line)
        yield row, line
        at = _past_space(text, after)
    if array and (at >= len(text) or _past_space(text, at + 1) < len(text)):
        refuse(path, "no valid JSON: the array does not end, or more follows it", text.count("\n", 0, at) + 1)


def _past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
