"""One table file as its rows are written: every value is a string, or None where nothing stands.

Not for what values mean: which rows lack a label and what becomes of them is decided in ``fedlab.data.rows``. Errors
name the file, the line, the cause and the fix, and quote no row.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from fedlab.errors import ConfigError

Column = list[str | None]
LONGEST_NAME, MOST_WORDS, MOST_NAMES = (
    40,
    3,
    12,
)  # of columns that an error names: a file without a header has rows there
MARKS = (  # of encodings, the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Table:
    """The columns that were asked for and are there.

    Args:
        path: the file.
        names: of all its columns, in its order.
        columns: name → value of each row as a string, None where there is none.
        lines: where each row begins, counted from 1: lines of a text file, rows of any other.
        unit: "line" or "row".
        lists: column → line of the first value in it that is a list, which stands there as JSON.
    """

    path: Path
    names: Sequence[str]
    columns: dict[str, Column]
    lines: Sequence[int]
    unit: str = "line"
    lists: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lines)


def refuse(path: Path, problem: str, at: int | None = None, unit: str = "line") -> NoReturn:
    """Raise ConfigError that names the file and the place."""
    where = f"{str(path)!r}" + (f", {unit} {at}" if at is not None else "")
    raise ConfigError(f"{where}: {problem}") from None


def decoded(path: Path, data: bytes) -> str:
    """The text of a file: UTF-8, or UTF-16 and UTF-32 with a byte-order mark; the mark itself is taken away.

    Raises ConfigError, with the line, for other encodings and for null bytes.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            refuse(path, f"is cut off or damaged: not {encoding.upper()}, as its first bytes say")
        line = data.count(b"\n", 0, error.start) + 1
        if data[:4].count(0) or data[-4:].count(0):
            refuse(
                path, "not UTF-8 text; UTF-16 without a byte-order mark? Convert it to UTF-8, for example with iconv"
            )
        refuse(path, "not UTF-8 text; convert the file, for example with iconv -f latin1 -t utf-8", line)
    if (at := text.find("\0")) >= 0:
        cause = "UTF-16 without a byte-order mark, or a damaged file"
        refuse(path, f"a null byte ({cause}); convert it to UTF-8 text", text.count("\n", 0, at) + 1)
    return text.removeprefix("\ufeff")


def canonical(value: bool | int | float) -> str | None:
    """A number or a truth value as text; None for NaN. Integers in decimal, floats as Python writes them ("1.0")."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return None if math.isnan(value) else repr(value)
    return str(value)


def listed(values: Sequence[object]) -> str | None:
    """A list of texts and numbers as JSON; None for a list that holds anything else."""
    found = [v if isinstance(v, str) else canonical(v) if isinstance(v, bool | int | float) else None for v in values]
    return None if None in found else json.dumps(found, ensure_ascii=False)


def structured(value: object) -> str:
    """A list or an object as JSON, whatever it holds."""
    return json.dumps(value, ensure_ascii=False)


def check_text(path: Path, column: str, value: str | None, at: int, unit: str) -> None:
    """Raise ConfigError for a value that is no text: a null character, or half of a surrogate pair."""
    if value is None or value.isascii():
        if value is not None and "\0" in value:
            refuse(path, f"a null character in column {shown([column])}; take it out", at, unit)
        return
    if "\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value):
        refuse(path, f"half of a surrogate pair, or a null character, in column {shown([column])}; repair it", at, unit)


def shown(names: Sequence[str], write: Callable[[str], str] = repr) -> str:
    """Names of columns for an error; none of them if one is too long to be a name: a file without a header has a row
    there.
    """
    if any(len(name) > LONGEST_NAME or len(name.split()) > MOST_WORDS for name in names):
        return f"{len(names)} column(s) whose names look like values (is the first line a header?)"
    return ", ".join(map(write, names[:MOST_NAMES])) + (", …" if len(names) > MOST_NAMES else "")


def check_names(path: Path, names: Sequence[str]) -> None:
    """Raise ConfigError where two columns have one name."""
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        refuse(path, f"{names.count(twice[0])} columns are called {shown(twice[:1])}; rename all but one")
