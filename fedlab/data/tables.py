"""Tables: local csv, jsonl and parquet files, and data sets of the Hugging Face hub, both read by ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedlab.config import DataSection
from fedlab.data.corpus import Corpus, encode_labels
from fedlab.errors import ConfigError

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
            raise ConfigError(f"data.{key} = {path!r}: want files of one kind among {', '.join(READERS)}, found {', '.join(sorted(kinds))}")
    if data.text is None or data.label is None:
        raise ConfigError('data.source = "files" needs data.text and data.label: the names of the columns')


def load_files(data: DataSection) -> Corpus:
    """Rows of local files; ``data.test_path``, if given, is the official test split."""
    check_files(data)
    assert data.path is not None and data.text is not None and data.label is not None
    parts = [_read(path) for path in (data.path, data.test_path) if path is not None]
    texts = [data.text] if isinstance(data.text, str) else list(data.text)
    return _corpus(Path(data.path).name, parts, texts, data.label, data.partition.column)


def load_hub(data: DataSection) -> Corpus:
    """A data set by its hub id (or a local copy of one), its ``validation`` split as the test split unless another is named."""
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
    parts = [found[split] for split in (data.split, test_split) if split in found]
    return _corpus(data.path, parts, texts, data.label or "label", data.partition.column)


def _read(path: str) -> Any:
    import datasets

    found = files_at(path)
    options: dict[str, Any] = {"delimiter": "\t"} if found[0].suffix == ".tsv" else {}
    try:
        return datasets.load_dataset(READERS[found[0].suffix], data_files=[str(p) for p in found], split="train", **options)
    except Exception as error:
        raise ConfigError(f"{path!r} cannot be read: {str(error.__cause__ or error).splitlines()[0]}") from None


def _corpus(name: str, parts: list[Any], texts: list[str], label: str, natural: str | None) -> Corpus:
    """Concatenate the splits (the second is the test split) into one corpus; rows without a label (−1 or empty) are dropped."""
    if not 1 <= len(texts) <= 2:
        raise ConfigError(f"data.text = {texts}: want one text column, or two for sentence pairs")
    columns: dict[str, list[Any]] = {column: [] for column in [*texts, label, *([natural] if natural else [])]}
    sizes = []
    for part in parts:
        for column in columns:
            if column not in part.column_names:
                raise ConfigError(f"column {column!r} is not in {name}; it has {', '.join(part.column_names)}")
        keep = [i for i, value in enumerate(part[label]) if value is not None and value != -1 and value != ""]
        sizes.append(len(keep))
        for column, values in columns.items():
            whole = list(part[column])
            values += [whole[i] for i in keep]
    feature = parts[0].features[label]
    if hasattr(feature, "names"):
        labels, names = np.array(columns[label], dtype=np.int64), tuple(feature.names)
    else:
        labels, names = encode_labels([str(v) for v in columns[label]])
    text_columns = [["" if v is None else str(v) for v in columns[column]] for column in texts]
    return Corpus(
        name,
        text_columns[0],
        labels,
        names,
        text_columns[1] if len(texts) == 2 else None,
        [str(v) for v in columns[natural]] if natural else None,
        sizes[1] if len(sizes) == 2 else 0,
    )
