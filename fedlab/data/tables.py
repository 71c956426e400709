"""Tables: local csv, jsonl and parquet files (read by pyarrow), and data sets of the Hugging Face hub (read by
``datasets``).
"""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlab.config.data import DataSection
from fedlab.data.corpus import Corpus, written
from fedlab.errors import ConfigError

FILES_KEYS = frozenset({"path", "test_path", "text", "label"})  # of [data]
HUB_KEYS = frozenset({"path", "subset", "split", "test_split", "revision", "text", "label"})
Columns = dict[str, list[Any]]
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# hub: subset or data set → text columns; the label column is "label"
TEXT_COLUMNS: dict[str, list[str]] = {
    "sst2": ["sentence"],
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "snli": ["premise", "hypothesis"],
    "qqp": ["question1", "question2"],
    "qnli": ["question", "sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}
TEST_SPLITS = {"mnli": "validation_matched"}


def files_at(path: str) -> list[Path]:
    """The data files at a path: itself, or those in a directory, in the order of their names."""
    place = Path(path).expanduser()
    if place.is_dir():
        return sorted(p for p in place.iterdir() if p.suffix in READERS)
    return [place] if place.is_file() else []


def check_files(data: DataSection) -> None:
    """Raise ConfigError unless the files exist and are of one known kind."""
    if data.path is None:
        raise ConfigError('data.source = "files" needs data.path: a csv, jsonl or parquet file, or a directory of them')
    for key, path in (("path", data.path), ("test_path", data.test_path)):
        if path is None:
            continue
        found = files_at(path)
        if not found:
            raise ConfigError(f"data.{key} = {path!r}: no such file, or a directory without {', '.join(READERS)} files")
        if len(kinds := {READERS.get(p.suffix, p.suffix) for p in found}) > 1 or found[0].suffix not in READERS:
            raise ConfigError(
                f"data.{key} = {path!r}: want files of one kind among {', '.join(READERS)}, found"
                f" {', '.join(sorted(kinds))}"
            )
    if (
        data.test_path is not None
        and Path(data.test_path).expanduser().resolve() == Path(data.path).expanduser().resolve()
    ):
        raise ConfigError(
            f"data.test_path = {data.test_path!r} is data.path: the test split would be trained on; leave it out, or"
            " give another"
        )
    if data.text is None or data.label is None:
        raise ConfigError('data.source = "files" needs data.text and data.label: the names of the columns')


def load_files(data: DataSection) -> Corpus:
    """Rows of local files; ``data.test_path``, if given, is the official test split."""
    check_files(data)
    assert data.path is not None
    assert data.text is not None
    assert data.label is not None
    owner = (data.partition.column,) if data.partition.column else ()
    parts = {path: read_columns(path, owner) for path in (data.path, data.test_path) if path is not None}
    texts = [data.text] if isinstance(data.text, str) else list(data.text)
    return _corpus(Path(data.path).name, parts, texts, data.label, data.partition.column, (None, ""))


def check_hub(data: DataSection) -> None:
    """Raise ConfigError unless a data set is named."""
    if data.path is None:
        raise ConfigError('data.source = "hub" needs data.path: the id of a data set, for example "nyu-mll/glue"')


def load_hub(data: DataSection) -> Corpus:
    """A data set by its hub id (or a local copy of one), its ``validation`` split as the test split unless another is
    named.
    """
    import datasets

    assert data.path is not None
    key = data.subset if data.subset in TEXT_COLUMNS else data.path.rpartition("/")[2]
    texts = [data.text] if isinstance(data.text, str) else list(data.text or TEXT_COLUMNS.get(key or "", []))
    if not texts:
        raise ConfigError(f"data.path = {data.path!r}: its text columns are not known; set data.text")
    test_split = data.test_split or TEST_SPLITS.get(key or "", "validation")
    try:
        found = datasets.load_dataset(data.path, data.subset, revision=data.revision)
    except Exception as error:  # the hub client raises a dozen kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"data.path = {data.path!r} cannot be loaded from the hub or its cache: {reason}") from None
    if data.split not in found:
        raise ConfigError(f"data.split = {data.split!r} is not in {data.path}; it has {', '.join(found)}")
    if data.test_split is not None and data.test_split not in found:
        raise ConfigError(f"data.test_split = {data.test_split!r} is not in {data.path}; it has {', '.join(found)}")
    if data.test_split == data.split:
        raise ConfigError(
            f"data.test_split = {data.test_split!r} is data.split: it would be trained on; leave it out, or give"
            " another"
        )
    label = data.label or "label"
    wanted = {*texts, label, data.partition.column}
    splits = {f"{data.path}, split {split}": found[split] for split in (data.split, test_split) if split in found}
    # Columns that are not needed are named, for the error message, and not read.
    parts = {n: {c: list(part[c]) if c in wanted else [] for c in part.column_names} for n, part in splits.items()}
    names = getattr(found[data.split].features.get(label), "names", None)
    return _corpus(data.path, parts, texts, label, data.partition.column, (None, "", -1), tuple(names or ()))


def read_columns(path: str, as_written: Sequence[str] = ()) -> Columns:
    """Columns of local files by pyarrow: no cache that could be stale, nothing but the files themselves.

    The columns named in ``as_written`` are strings as a csv file has them: "01" is not "1".
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import csv, json, parquet

    columns: Columns = {}
    for file in files_at(path):
        kind = READERS[file.suffix]
        # One block: a row may not straddle two, and the types of a csv's columns are guessed from the first.
        block = min(max(file.stat().st_size, 1 << 20), (1 << 31) - 1)
        try:
            if kind == "csv":
                options = csv.ParseOptions(delimiter="\t" if file.suffix == ".tsv" else ",", newlines_in_values=True)
                types = csv.ConvertOptions(column_types=dict.fromkeys(as_written, pa.string()))
                table = csv.read_csv(file, csv.ReadOptions(block_size=block), options, types)
            elif kind == "json":  # one object per line, or one array of objects
                if file.read_text(encoding="utf-8").lstrip().startswith("["):
                    table = pa.Table.from_pylist(json_module.loads(file.read_text(encoding="utf-8")))
                else:
                    table = json.read_json(
                        file, json.ReadOptions(block_size=block), json.ParseOptions(newlines_in_values=True)
                    )
            else:
                table = parquet.read_table(file)
        except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{str(file)!r} cannot be read: {str(error).splitlines()[0]}") from None
        if binary := [field.name for field in table.schema if pa.types.is_binary(field.type)]:
            raise ConfigError(
                f"{str(file)!r}: column {', '.join(binary)} is not UTF-8 text; convert the file, for example with iconv"
            )
        if columns and list(columns) != table.column_names:
            raise ConfigError(
                f"{str(file)!r} has columns {', '.join(table.column_names)}; the files before it have"
                f" {', '.join(columns)}"
            )
        for name in table.column_names:
            columns.setdefault(name, []).extend(table.column(name).to_pylist())
    return columns


def _corpus(
    name: str,
    parts: dict[str, Columns],
    texts: list[str],
    label: str,
    natural: str | None,
    unlabelled: tuple[Any, ...],
    label_names: tuple[str, ...] = (),
) -> Corpus:
    """Concatenate the splits (the second is the test split) into one corpus; rows whose label is one of ``unlabelled``
    are dropped. With ``label_names`` the labels are positions among them.
    """
    if not 1 <= len(texts) <= 2:
        raise ConfigError(f"data.text = {texts}: want one text column, or two for sentence pairs")
    columns: Columns = {column: [] for column in [*texts, label, *([natural] if natural else [])]}
    sizes: list[int] = []
    for part_name, part in parts.items():
        wanted = [
            column for column in columns if not sizes or column in (*texts, label)
        ]  # nobody owns the official test split
        for column in wanted:
            if column not in part:
                raise ConfigError(f"column {column!r} is not in {part_name}; it has {', '.join(part)}")
        keep = [i for i, value in enumerate(part[label]) if value not in unlabelled]
        sizes.append(len(keep))
        for column, values in columns.items():
            values += [part[column][i] for i in keep] if column in wanted else [""] * len(keep)
    if natural and (lacking := sum(value in (None, "") for value in columns[natural][: sizes[0]])):
        raise ConfigError(
            f"{name}: {lacking} of {sizes[0]} rows have nothing in column {natural!r}, which names the client; fill it"
            " in, or remove them"
        )
    labels = [label_names[v] if label_names else str(v) for v in columns[label]]
    text_columns = [["" if v is None else str(v) for v in columns[column]] for column in texts]
    return Corpus(
        name,
        text_columns[0],
        written(labels),
        label_names,
        text_columns[1] if len(texts) == 2 else None,
        [str(v) for v in columns[natural]] if natural else None,
        sizes[1] if len(sizes) == 2 else 0,
    )
