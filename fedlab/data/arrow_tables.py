"""Parquet and Arrow files, and tables of ``datasets``: typed columns as strings.

Numbers become their canonical text (``fedlab.data.table.canonical``), so an integer is never a float and a text never a
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlab.data.table import Column, Table, canonical, check_names, listed, refuse, shown, structured


def read_parquet(
    path: Path, wanted: Sequence[str] | None, nested: str | None = None, lists: str | None = None
) -> Table:
    """The table of a parquet file; ``wanted`` as for ``from_arrow``. Raises ConfigError for one that cannot be read."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
        check_names(path, names)
        table = file.read(columns=names if wanted is None else [name for name in names if name in wanted])
    except (pa.ArrowException, OSError, ValueError) as error:
        refuse(path, f"no readable Parquet file ({type(error).__name__}); write it again")
    return from_arrow(path, table, wanted, names, nested, lists)


def read_arrow(path: Path, wanted: Sequence[str] | None, nested: str | None = None, lists: str | None = None) -> Table:
    """The table of an Arrow file or stream (also Feather, version 2); as ``read_parquet``."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                table = pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_stream(source).read_all()
            check_names(path, table.column_names)
            return from_arrow(path, table, wanted, nested=nested, lists=lists)
    except (pa.ArrowException, OSError, ValueError) as error:
        refuse(path, f"no readable Arrow file ({type(error).__name__}); write it again")


def from_arrow(
    path: Path,
    table: Any,
    wanted: Sequence[str] | None,
    names: Sequence[str] | None = None,
    nested: str | None = None,
    lists: str | None = None,
) -> Table:
    """An Arrow table as strings.

    Args:
        path: what errors call it.
        table: of pyarrow.
        wanted: columns to keep, refused if they hold lists or bytes; None for all that hold single values.
        names: of all columns, if the table has not all of them.
        nested: the column whose lists are kept, as JSON.
        lists: the column whose lists of single values are kept, as JSON.

    Raises:
        ConfigError: a wanted column holds neither text nor single values.
    """
    import pyarrow as pa

    columns: dict[str, Column] = {}
    first: dict[str, int] = {}
    for name in table.column_names:
        if wanted is not None and name not in wanted:
            continue
        kind = table.schema.field(name).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if name == lists and (pa.types.is_list(plain) or pa.types.is_large_list(plain)):
            columns[name] = _as_text(path, name, table.column(name).to_pylist())
            if any(there := [value is not None for value in columns[name]]):
                first[name] = 1 + there.index(True)
            continue
        bytes_ = pa.types.is_binary(plain) or pa.types.is_large_binary(plain) or pa.types.is_fixed_size_binary(plain)
        if name == nested and pa.types.is_nested(plain):
            columns[name] = [None if v is None else structured(v) for v in table.column(name).to_pylist()]
            continue
        if bytes_ or pa.types.is_nested(plain):
            if wanted is not None:
                held = "bytes, not UTF-8 text" if bytes_ else "lists or objects"
                refuse(path, f"column {shown([name])} holds {held}; want text, numbers or true/false")
            continue
        columns[name] = _strings(path, name, table.column(name), plain)
    return Table(path, list(names or table.column_names), columns, range(1, table.num_rows + 1), "row", first)


def _as_text(path: Path, name: str, values: Sequence[list[Any] | None]) -> Column:
    """Lists of single values as JSON."""
    found = [None if value is None else listed(value) for value in values]
    for row, (value, text) in enumerate(zip(values, found, strict=True), 1):
        if value is not None and text is None:
            refuse(path, f"column {shown([name])} holds lists of other things than texts and numbers", row, "row")
    return found


def _strings(path: Path, name: str, column: Any, kind: Any) -> Column:
    import pyarrow as pa

    single = pa.types.is_float16(kind) or pa.types.is_float32(kind)
    values: Column = []
    row = 0
    for chunk in column.chunks:
        try:
            held = chunk.to_pylist()
        except UnicodeDecodeError:
            held = []
            for scalar in chunk:  # which of them it is
                row += 1
                try:
                    scalar.as_py()
                except UnicodeDecodeError:
                    break
            refuse(path, f"column {shown([name])} is not UTF-8 text", row, "row")
        row += len(held)
        values.extend(_string(value, single) for value in held)
    return values


def _string(value: Any, single: bool) -> str | None:
    """One value as text; a float of 32 bits in as many digits as tell it from others of 32 bits."""
    import numpy as np

    if value is None or isinstance(value, str):
        return value
    if single and value == value:
        return str(np.float32(value))
    if isinstance(value, bool | int | float):
        return canonical(value)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
