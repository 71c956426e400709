"""Labels that an objective cannot learn are refused with their lines, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedlab.config.data import DataSection
from fedlab.data.corpus import Corpus, renumbered, written
from fedlab.data.several import unpacked
from fedlab.data.sources import load_corpus
from fedlab.data.unfit import fit_labels
from fedlab.errors import ConfigError, LabelError
from fedlab.objectives import Regression


def section(path: Path, **keys: object) -> DataSection:
    return DataSection.model_validate(
        {"source": "files", "path": str(path), "text": "text", "label": "label", "clients": 2, **keys}
    )


def csv(path: Path, *labels: str) -> Path:
    quoted = [label.replace('"', '""') for label in labels]
    path.write_text("text,label\n" + "".join(f'secret words {i},"{label}"\n' for i, label in enumerate(quoted)))
    return path


def test_what_is_no_number_is_refused_with_its_lines_and_without_its_words(tmp_path: Path):
    path = csv(tmp_path / "a.csv", "1.5", "high", "-2e3", "inf", "1e39", "1_0", "0x10")
    with pytest.raises(ConfigError) as caught:
        load_corpus(section(path), 0, objective="regression")
    text = str(caught.value)
    assert "5 of 7 rows have a label that is no finite number (a.csv: line 3, a.csv: line 5, a.csv: line 6, …)" in text
    assert "high" not in text
    assert "secret" not in text


def test_left_out_rows_are_counted_and_the_test_split_stays_at_the_end(tmp_path: Path):
    path, test = csv(tmp_path / "a.csv", "1", "x", "2"), csv(tmp_path / "b.csv", "y", "3", "4")
    corpus = load_corpus(section(path, test_path=str(test), on_bad_row="drop"), 0, objective="regression")
    assert corpus.labels.dtype == np.float32
    assert corpus.labels.tolist() == [1, 2, 3, 4]
    assert corpus.test == 2
    assert corpus.reading is not None
    assert corpus.reading.dropped == {"a label that is no finite number": 2}
    assert corpus.reading.places["a label that is no finite number"] == ["a.csv: line 3", "b.csv: line 2"]


def test_a_source_of_names_has_no_numbers():
    corpus = Corpus("docstrings", ["a", "b"], written(["numpy", "2"]))
    with pytest.raises(ConfigError, match=r"1 of 2 rows have a label that is no finite number; take another source"):
        fit_labels(corpus, Regression.unfit, DataSection(source="docstrings"))


def test_several_labels_in_each_of_their_forms(tmp_path: Path):
    path = csv(tmp_path / "a.csv", '["b", "a, c"]', "a, c|b", "b", "[]", '["b", "b"]', "[2, 10]")
    corpus = load_corpus(section(path), 0, objective="multi-label")
    wanted = [["a, c", "b"], ["a, c", "b"], ["b"], [], ["b"], ["10", "2"]]
    assert [unpacked(label)[1] for label in corpus.labels] == wanted
    assert corpus.label_names == ("10", "2", "a, c", "b")
    assert corpus.label_counts(np.arange(6)).tolist() == [1, 1, 2, 4]
    bad = csv(tmp_path / "b.csv", "a", "[a]", "a||b", '["a", ""]', '[["a"]]')
    with pytest.raises(ConfigError) as caught:
        load_corpus(section(bad), 0, objective="multi-label")
    assert "begins with [ and is no JSON list of names (b.csv: line 3, b.csv: line 6)" in str(caught.value)
    assert "has an empty name in it (b.csv: line 4, b.csv: line 5)" in str(caught.value)


def test_lists_of_classes_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    import datasets

    names = ["joy", "anger", "fear"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.Sequence(datasets.ClassLabel(names=names))}
    )
    rows = {"text": ["a", "b", "c"], "labels": [[2, 0], [], [1]]}
    found = {"train": datasets.Dataset.from_dict(rows, features=features)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    data = DataSection(source="hub", path="some/emotions", text="text", label="labels", clients=2)
    corpus = load_corpus(data, 0, objective="multi-label")
    assert corpus.label_names == tuple(names)
    assert [unpacked(label)[1] for label in corpus.labels] == [["fear", "joy"], [], ["anger"]]
    other = renumbered(corpus, ("fear", "anger", "joy", "surprise"))
    assert other.label_counts(np.arange(3)).tolist() == [1, 1, 1, 0]
    with pytest.raises(LabelError, match="has the label 'fear', which is not among the 2"):
        renumbered(corpus, ("joy", "anger"))


def test_lists_of_files_are_labels_of_several_and_of_nothing_else(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": f"t{i}", "label": own} for i, own in enumerate((["a"], [], ["b", "a"], [3]))]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = pa.table({"text": ["t0", "t1", "t2"], "label": [["a"], [], ["b", "a"]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    for file, count in ((path, 4), (tmp_path / "a.parquet", 3)):
        corpus = load_corpus(section(file), 0, objective="multi-label")
        assert [unpacked(label)[1] for label in corpus.labels] == [["a"], [], ["a", "b"], ["3"]][:count]
        with pytest.raises(ConfigError, match=r"1: column 'label' holds a list, .*\"multi-label\" learns lists"):
            load_corpus(section(file), 0)
    path.write_text('{"text": "t", "label": [{"a": 1}]}')
    with pytest.raises(ConfigError, match="column 'label' holds a list"):
        load_corpus(section(path), 0, objective="multi-label")
