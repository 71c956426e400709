"""Tables: local csv, tsv, json, jsonl, parquet and arrow files, and data sets of the Hugging Face hub (read by
``datasets``). What is written in a column of labels, owners or texts is what is kept: "01" is not "1".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlab.config.data import DataSection
from fedlab.data.arrow_tables import from_arrow, read_arrow, read_parquet
from fedlab.data.corpus import Corpus
from fedlab.data.delimited import read_delimited
from fedlab.data.json_tables import read_json
from fedlab.data.reading import Reading, SourceFile
from fedlab.data.rows import Columns, columns_of, corpus_of
from fedlab.data.table import Column, Table, decoded, listed, refuse
from fedlab.errors import ConfigError

TABLE_KEYS = frozenset({"text", "label", "context", "messages", "on_bad_row"})  # of [data]
FILES_KEYS = TABLE_KEYS | {"path", "test_path"}
HUB_KEYS = TABLE_KEYS | {"path", "subset", "split", "test_split", "revision"}
READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
HELD_OUT = ("test", "valid", "validation", "val", "dev", "eval", "heldout")  # names of files beside "train…"
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
    "stsb": ["sentence1", "sentence2"],
}
TEST_SPLITS = {"mnli": "validation_matched"}


def files_at(path: str) -> list[Path]:
    """The data files at a path: itself, or those in a directory, in the order of their names."""
    place = Path(path).expanduser()
    if place.is_dir():
        return sorted(p for p in place.iterdir() if p.suffix.lower() in READERS and p.name[0] != "." and p.is_file())
    return [place] if place.is_file() else []


def training_files(data: DataSection) -> tuple[list[Path], dict[str, str]]:
    """The files that are trained on, and path → why for files at ``data.path`` that are not.

    Those of ``data.test_path`` are not, whatever way leads to them; nor are, beside a file called "train…", those
    whose names say that they are another split.
    """
    assert data.path is not None
    found, left_out = files_at(data.path), dict[str, str]()
    tests = {p.resolve() for p in files_at(data.test_path)} if data.test_path is not None else set()
    split = len(found) > 1 and any(_says(p, ("train",)) for p in found)
    for path in found:
        if path.resolve() in tests:
            left_out[str(path)] = "is the test split (data.test_path)"
        elif split and _says(path, HELD_OUT):
            left_out[str(path)] = "is another split by its name"
    return [path for path in found if str(path) not in left_out], left_out


def _says(path: Path, words: Sequence[str]) -> bool:
    """Whether a file's name begins with one of these words."""
    letters = path.stem.lower()
    return any(letters.startswith(word) and not letters[len(word) : len(word) + 1].isalpha() for word in words)


def source_files(data: DataSection) -> list[tuple[str, Path]]:
    """(split, file) of all that is read."""
    if data.path is None:
        return []
    tests = files_at(data.test_path) if data.test_path is not None else []
    return [*(("train", p) for p in training_files(data)[0]), *(("test", p) for p in tests)]


def check_files(data: DataSection) -> None:
    """Raise ConfigError unless the files exist and are of one known kind."""
    if data.path is None:
        raise ConfigError(
            'data.source = "files" needs data.path: a csv, jsonl, parquet or arrow file, or a directory of them'
        )
    for key, path in (("path", data.path), ("test_path", data.test_path)):
        if path is None:
            continue
        found = files_at(path)
        if not found:
            raise ConfigError(f"data.{key} = {path!r}: no such file, or a directory without {', '.join(READERS)} files")
        kinds = {READERS.get(p.suffix.lower(), p.suffix) for p in found}
        if len(kinds) > 1 or not kinds <= set(READERS.values()):
            raise ConfigError(
                f"data.{key} = {path!r}: want files of one kind among {', '.join(READERS)}, found"
                f" {', '.join(sorted(kinds))}"
            )
    if not training_files(data)[0]:
        raise ConfigError(
            f"data.test_path = {data.test_path!r} is, or holds, all of data.path: the test split would be trained on;"
            " leave it out, or give another"
        )
    if data.text is None and data.messages is None:
        raise ConfigError(
            'data.source = "files" needs data.text and data.label: the names of the columns; or data.messages, that of'
            " whole conversations"
        )


def load_files(data: DataSection) -> Corpus:
    """Rows of local files; ``data.test_path``, if given, is the official test split."""
    check_files(data)
    assert data.path is not None
    columns = columns_of(data, _named(data.text), data.label)
    training, left_out = training_files(data)
    reading = Reading(left_out=left_out)
    splits = [_tables(training, columns, reading, "train")]
    if data.test_path is not None:
        splits.append(_tables(files_at(data.test_path), columns, reading, "test"))
    _check_copies(data, reading)
    return corpus_of(Path(data.path).name, splits, columns, data, reading)


def _named(text: str | tuple[str, ...] | None) -> list[str]:
    """Text columns as a list."""
    return [text] if isinstance(text, str) else list(text or ())


def _tables(files: Sequence[Path], columns: Columns, reading: Reading, split: str) -> list[Table]:
    tables = []
    for path in files:
        table, content = read_table(path, columns.all, columns.coded, columns.nested, columns.label)
        found = SourceFile(str(path.resolve()), len(table), content[0], content[1], split)
        reading.files.append(found)
        tables.append(table)
    return tables


def _check_copies(data: DataSection, reading: Reading) -> None:
    """Raise ConfigError where a file of the test split is a copy of one that is trained on."""
    trained = {file.sha256: file.path for file in reading.files if file.split == "train" and file.rows}
    for file in reading.files:
        if file.split == "test" and file.sha256 in trained:
            raise ConfigError(
                f"data.test_path = {data.test_path!r}: {file.path!r} is a copy of {trained[file.sha256]!r}, which would"
                " be trained on; take it out of data.path"
            )


def read_table(
    path: Path,
    wanted: Sequence[str] | None = None,
    coded: Sequence[str] = (),
    nested: str | None = None,
    lists: str | None = None,
) -> tuple[Table, tuple[int, str]]:
    """A local file as strings, and its size and SHA-256: no cache that could be stale, nothing but the file itself.

    Args:
        path: its suffix says what it is.
        wanted: columns to keep, which must hold single values; None for all that do.
        coded: those of few different values.
        nested: the one that may hold lists and objects, which are kept as JSON.
        lists: the one that may hold lists of single values, which are kept as JSON.

    Raises:
        ConfigError: it cannot be read in one way only.
    """
    kind = READERS[path.suffix.lower()]
    try:
        data = path.read_bytes()
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror}")
    content = len(data), hashlib.sha256(data).hexdigest()
    if kind == "csv":
        return read_delimited(path, decoded(path, data), "\t" if path.suffix.lower() == ".tsv" else ",", coded), content
    if kind == "json":
        return read_json(path, decoded(path, data), wanted, nested, lists), content
    del data
    return (read_parquet if kind == "parquet" else read_arrow)(path, wanted, nested, lists), content


def read_columns(path: str) -> dict[str, Column]:
    """Columns of all local files at a path, as strings. Raises ConfigError where they have different ones."""
    columns: dict[str, Column] = {}
    for file in files_at(path):
        table, _ = read_table(file)
        if columns and set(columns) != set(table.columns):
            raise ConfigError(f"{str(file)!r} has other columns than the files before it")
        for name, values in table.columns.items():
            columns.setdefault(name, []).extend(values)
    return columns


def check_hub(data: DataSection) -> None:
    """Raise ConfigError unless a data set is named."""
    if data.path is None:
        raise ConfigError('data.source = "hub" needs data.path: the id of a data set, for example "nyu-mll/glue"')


def load_hub(data: DataSection) -> Corpus:
    """A data set by its hub id (or a local copy of one), its ``validation`` split as the test split unless another is
    named.
    """
    assert data.path is not None
    key = data.subset if data.subset in TEXT_COLUMNS else data.path.rpartition("/")[2]
    texts = _named(data.text) or TEXT_COLUMNS.get(key or "", [])
    if not texts and data.messages is None:
        raise ConfigError(f"data.path = {data.path!r}: its text columns are not known; set data.text, or data.messages")
    columns = columns_of(data, texts, data.label)
    test_split = data.test_split or TEST_SPLITS.get(key or "", "validation")
    found = _downloaded(data, columns)
    if data.split not in found:
        raise ConfigError(f"data.split = {data.split!r} is not in {data.path}; it has {', '.join(found)}")
    if data.test_split is not None and data.test_split not in found:
        raise ConfigError(f"data.test_split = {data.test_split!r} is not in {data.path}; it has {', '.join(found)}")
    if data.test_split == data.split:
        raise ConfigError(
            f"data.test_split = {data.test_split!r} is data.split: it would be trained on; leave it out, or give"
            " another"
        )
    kind = found[data.split].features.get(columns.label)
    names = getattr(getattr(kind, "feature", kind), "names", None)  # of classes, or of lists of classes
    splits = [
        [_hub_table(f"{data.path}, split {split}", found[split], columns, names)]
        for split in (data.split, test_split)
        if split in found
    ]
    return corpus_of(data.path, splits, columns, data, Reading(), tuple(names or ()), unlabelled="-1")


def _downloaded(data: DataSection, columns: Columns) -> Any:
    """The splits of a data set; what it has as csv files is read as strings, since ``datasets`` would guess types."""
    import datasets

    def load(**options: Any) -> Any:
        try:
            return datasets.load_dataset(data.path, data.subset, revision=data.revision, **options)
        except Exception as error:  # the hub client raises a dozen kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"data.path = {data.path!r} cannot be loaded from the hub or its cache: {reason}"
            ) from None

    found = load()
    guessed = any(
        getattr(part, "builder_name", None) == "csv"
        and any(getattr(part.features.get(c), "dtype", "string") != "string" for c in columns.all)
        for part in found.values()
    )
    if not guessed:
        return found
    names = next(iter(found.values())).column_names
    strings = datasets.Features({name: datasets.Value("string") for name in names})
    return load(features=strings, keep_default_na=False)


def _hub_table(name: str, part: Any, columns: Columns, names: Sequence[str] | None) -> Table:
    """One split as strings; numbers of classes as the classes' names, "-1" where there is none."""
    there = [column for column in part.column_names if column in columns.all]
    whole = part.select_columns(there).with_format("arrow")[:]
    table = from_arrow(Path(name), whole, columns.all, part.column_names, columns.nested, columns.label)
    if names is not None and table.lists:
        for column in table.lists:
            values = table.columns[column]
            table.columns[column] = [v and listed([names[int(n)] for n in json.loads(v)]) for v in values]
    elif names is not None and columns.label in table.columns:
        values = table.columns[columns.label]
        for row, value in enumerate(values, 1):
            if value not in (None, "-1") and not 0 <= int(value) < len(names):
                refuse(table.path, f"class {value} of {len(names)} in column {columns.label!r}", row, "row")
        table.columns[columns.label] = [v if v in (None, "-1") else names[int(v)] for v in values]
    return table
