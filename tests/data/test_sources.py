"""Sources: parsers on files made here, errors that say what to do, and the embedded default as it is."""

from __future__ import annotations

import ast
import csv
import json
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlab.config.sections import DataSection, Partition
from fedlab.data import docstrings, wordnet
from fedlab.data.partition import assign
from fedlab.data.sources import check_source, load_corpus
from fedlab.errors import ConfigError
from fedlab.objectives.classification import Classification

SYNSETS = """\
  1 This software and database is being provided to you, the LICENSEE
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived; "an example; with a semicolon"
00015388 05 n 02 animal 0 beast 0 001 @ 00004475 n 0000 | a living organism characterized by voluntary movement
00017222 20 n 01 plant 0 001 @ 00004475 n 0000 | (botany) a living organism lacking the power of locomotion; an alga
"""


@pytest.fixture
def tiny_wordnet(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(SYNSETS)
    return tmp_path


def test_wordnet_glosses_lose_their_examples_and_get_their_lexicographer_file(tiny_wordnet: Path):
    corpus = load_corpus(DataSection(source="wordnet", path=str(tiny_wordnet)), 0)
    assert [corpus.label_names[i] for i in corpus.labels] == ["noun.Tops", "noun.animal", "noun.plant"]
    assert corpus.texts[0] == "that which is perceived"
    assert corpus.texts[2].endswith("; an alga"), "a semicolon inside a definition is kept"
    assert len(wordnet.LEXICOGRAPHER_FILES) == 45


def test_a_missing_wordnet_names_the_fix(tmp_path: Path):
    with pytest.raises(ConfigError, match="make data"):
        check_source(DataSection(source="wordnet", path=str(tmp_path)))
    (tmp_path / "data.noun").write_text(SYNSETS)
    with pytest.raises(ConfigError, match="must be one of noun"):
        check_source(DataSection(source="wordnet", path=str(tmp_path), subset="nouns"))
    with pytest.raises(ConfigError, match=r"no data\.verb in"):
        check_source(DataSection(source="wordnet", path=str(tmp_path), subset="verb"))


def test_a_natural_partition_needs_a_source_with_columns():
    with pytest.raises(ConfigError, match="has no columns"):
        check_source(DataSection(partition=Partition(kind="natural", column="who")))


@pytest.mark.skipif(
    not any((Path(p) / "data.noun").is_file() for p in wordnet.PLACES), reason="wordnet-base is not installed"
)
def test_installed_wordnet_has_its_82115_nouns_in_26_classes():
    corpus = load_corpus(DataSection(source="wordnet"), 0)
    assert (len(corpus), len(corpus.label_names)) == (82115, 26)


def test_docstrings_are_many_balanced_and_do_not_name_their_label():
    corpus = load_corpus(DataSection(), 0)
    assert len(corpus.label_names) >= 8
    assert len(corpus) >= 8000
    assert len(set(corpus.texts)) == len(corpus)
    assert np.bincount(corpus.labels).min() >= 500
    for text, label in zip(corpus.texts, corpus.labels, strict=True):
        for name in docstrings.LIBRARIES[corpus.label_names[label]]:
            if len(name) > 4:
                assert name not in text.lower(), text
            else:  # inside a word it need not be the name: array
                assert name not in re.split(r"[^a-z]+", text.lower()), text
    assert docstrings.load(DataSection()).texts == corpus.texts


def test_blocks_are_those_of_ast_walk_in_its_order():
    source = (
        Path(docstrings.__file__).read_text()
        + """
class A:
    x = lambda: 1
    try:
        def b(self): "doc b"
    except ValueError:
        def c(self): "doc c"
    else:
        class D: "doc d"
    finally:
        y = 1 if x else 2
match 1:
    case 1:
        def e(): "doc e"
"""
    )
    tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    wanted = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    assert [node for node in docstrings.blocks(tree) if isinstance(node, kinds)] == wanted
    assert len(wanted) > 10


def test_masks_reach_into_identifiers_and_spare_other_words():
    assert (
        docstrings.mask_of("numpy").sub("library", "NumPy's numpyconfig, np.input, np_x")
        == "library's libraryconfig, library.input, library_x"
    )
    assert docstrings.mask_of("ray").sub("library", "An array in Ray") == "An array in library"


def test_docstrings_are_read_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(docstrings, "PER_LIBRARY", 5)
    before = set(sys.modules)
    docstrings.load(DataSection())
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & {"sqlalchemy", "sympy", "networkx"}


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of all elements.\n\nMore text.", "Return the sum of all elements."),
        ("Compute a thing over\n    two lines. And more.", "Compute a thing over two lines."),
        ("Values, e.g. of an array, are kept as they are.", "Values, e.g. of an array, are kept as they are."),
        ("Short.", None),
        ("A title of words\n=================", None),
    ],
)
def test_first_sentences(docstring: str, expected: str | None):
    assert docstrings.first_sentence(docstring) == expected


def test_too_few_libraries_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docstrings, "LIBRARIES", {f"no-such-library-{i}": () for i in range(9)})
    with pytest.raises(ConfigError, match="install no-such-library-0"):
        check_source(DataSection())


@pytest.fixture
def rows() -> list[dict[str, object]]:
    return [{"a": f"text {i}", "b": f"pair {i}", "y": ["no", "yes"][i % 2], "who": f"site{i % 3}"} for i in range(12)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_of_every_kind(kind: str, rows: list[dict[str, object]], tmp_path: Path):
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    for place in (path, tmp_path):
        corpus = load_corpus(DataSection(source="files", path=str(place), text=("a", "b"), label="y"), 0)
        assert corpus.texts == [row["a"] for row in rows]
        assert corpus.pairs == [row["b"] for row in rows]
        assert [corpus.label_names[i] for i in corpus.labels] == [row["y"] for row in rows]


def test_a_test_file_is_the_official_test_split(rows: list[dict[str, object]], tmp_path: Path):
    for name, part in (("train.jsonl", rows[:8]), ("test.jsonl", rows[8:])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, part)))
    data = DataSection(
        source="files",
        path=str(tmp_path / "train.jsonl"),
        test_path=str(tmp_path / "test.jsonl"),
        text="a",
        label="y",
        limit=4,
    )
    corpus = load_corpus(data, 0)
    assert (len(corpus), corpus.test) == (8, 4)
    assert corpus.texts[4:] == [row["a"] for row in rows[8:]]


def test_the_column_of_owners_is_not_needed_in_the_test_file(rows: list[dict[str, object]], tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[:8])))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"a": row["a"], "y": row["y"]}) for row in rows[8:]))
    paths = {"path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl")}
    partition = Partition(kind="natural", column="who")
    corpus = load_corpus(DataSection(source="files", text="a", label="y", partition=partition, **paths), 0)
    assert corpus.natural is not None
    assert corpus.natural[:8] == [row["who"] for row in rows[:8]]
    assert (len(corpus.natural), corpus.test) == (12, 4)


def test_minus_one_in_a_file_is_a_class_and_integers_sort_as_numbers(tmp_path: Path):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"a": "x", "y": i % 13 - 1}) for i in range(26)))
    corpus = load_corpus(DataSection(source="files", path=str(tmp_path / "d.jsonl"), text="a", label="y"), 0)
    assert corpus.label_names == tuple(str(i) for i in range(-1, 12))
    assert len(corpus) == 26


def _files(path: Path) -> DataSection:
    return DataSection(source="files", path=str(path), text="a", label="y")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_long_rows_and_late_text_are_read(kind: str, tmp_path: Path):
    texts = ["1"] * 300_000 + ["x" * 2_000_000, "a word"]  # numbers fill the first megabyte
    path = tmp_path / f"d.{kind}"
    rows = [f"{text},{i % 2}" for i, text in enumerate(texts)]
    objects = (json.dumps({"a": text, "y": i % 2}) for i, text in enumerate(texts))
    path.write_text("a,y\n" + "\n".join(rows) if kind == "csv" else "\n".join(objects))
    assert load_corpus(_files(path), 0).texts == texts


def test_text_that_is_not_utf8_is_refused(tmp_path: Path):
    (tmp_path / "d.csv").write_bytes("a,y\ncafé,1\nbar,2\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_corpus(_files(tmp_path / "d.csv"), 0)


def test_local_files_are_read_without_the_network(
    rows: list[dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets
    import huggingface_hub.constants

    for module in (
        datasets.config,
        huggingface_hub.constants,
    ):  # as for a user, not as conftest.py has it for every test
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    attempts = []

    def refuse(*arguments: object, **_: object) -> None:
        attempts.append(arguments)
        raise OSError("no network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    data = DataSection(
        source="files", path=str(tmp_path / "d.jsonl"), text="a", label="y", clients=2, min_client_size=2
    )
    assign(load_corpus(data, 0), data, 0)
    assert attempts == []


def test_a_changed_file_is_read_again(rows: list[dict[str, object]], tmp_path: Path):
    path = tmp_path / "d.jsonl"
    for change in ("before", "after"):
        path.write_text("\n".join(json.dumps({**row, "a": change}) for row in rows))
        assert set(load_corpus(_files(path), 0).texts) == {change}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"path": None}, "needs data.path"),
        ({"path": "/nowhere/x.csv"}, "no such file"),
        ({"label": None}, "needs data.text and data.label"),
        ({"label": "nope"}, "column 'nope' is not in"),
    ],
)
def test_file_errors(change: dict[str, object], expected: str, rows: list[dict[str, object]], tmp_path: Path):
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = DataSection(**{"source": "files", "path": str(tmp_path / "d.jsonl"), "text": "a", "label": "y", **change})
    with pytest.raises(ConfigError, match=expected):  # load_corpus begins with what check_source checks
        load_corpus(data, 0)
    if "label" not in change:  # which columns there must be, the objective says
        with pytest.raises(ConfigError, match=expected):
            check_source(data)


def test_the_test_split_is_never_the_training_split(rows: list[dict[str, object]], tmp_path: Path, local_glue: Path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match="would be trained on"):
        check_source(_files(path).model_copy(update={"test_path": f"{tmp_path}/./d.jsonl"}))
    data = DataSection(source="hub", path=str(local_glue), text=("premise", "hypothesis"), test_split="train")
    with pytest.raises(ConfigError, match="would be trained on"):
        load_corpus(data, 0)


@pytest.fixture
def local_glue(tmp_path: Path) -> Path:
    """A data-set directory as the hub lays one out: split files that ``datasets`` finds by name."""
    tmp_path = tmp_path / "glue"
    tmp_path.mkdir()
    for split, count in (("train", 20), ("validation", 6)):
        lines = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": (i % 3) - (i == 3)} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_hub_code_on_a_local_directory(local_glue: Path):
    data = DataSection(source="hub", path=str(local_glue), text=("premise", "hypothesis"))
    corpus = load_corpus(data, 0)
    assert (len(corpus), corpus.test) == (24, 5), "the row with label -1 is dropped from both splits"
    assert corpus.pairs is not None
    assert corpus.pairs[0] == "h 0"


def test_hub_errors(local_glue: Path):
    with pytest.raises(ConfigError, match=r"needs data\.path"):
        check_source(DataSection(source="hub"))
    with pytest.raises(ConfigError, match=r"set data\.text"):
        load_corpus(DataSection(source="hub", path=str(local_glue)), 0)
    with pytest.raises(ConfigError, match="it has train, validation"):
        load_corpus(DataSection(source="hub", path=str(local_glue), text="premise", split="dev"), 0)
    with pytest.raises(ConfigError, match="cannot be loaded from the hub"):
        load_corpus(DataSection(source="hub", path="no-such-user/no-such-set", text="x"), 0)


def test_one_label_is_not_a_task(tmp_path: Path):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"a": "x", "y": "same"}) for _ in range(5)))
    names = load_corpus(_files(tmp_path / "d.jsonl"), 0).label_names
    with pytest.raises(ConfigError, match="at least 2"):
        Classification.check_labels(names, "d.jsonl")


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_owners_are_named_as_they_are_written(kind: str, tmp_path: Path):
    comma = "," if kind == "csv" else "\t"
    owners = ["01", "1", "1.0", "NA"]
    rows = [comma.join([f"t{i}", "no" if i % 2 else "yes", owners[i % 4]]) for i in range(8)]
    (tmp_path / f"d.{kind}").write_text("\n".join([comma.join(["a", "y", "who"]), *rows]))
    data = _files(tmp_path / f"d.{kind}").model_copy(update={"partition": Partition(kind="natural", column="who")})
    assert load_corpus(data, 0).natural == owners * 2


def test_a_row_without_an_owner_is_refused(tmp_path: Path):
    (tmp_path / "d.csv").write_text("a,y,who\nx,1,north\nz,2,\n")
    data = _files(tmp_path / "d.csv").model_copy(update={"partition": Partition(kind="natural", column="who")})
    with pytest.raises(ConfigError, match="1 of 2 rows have nothing in column 'who'"):
        load_corpus(data, 0)


def test_a_key_that_the_source_does_not_read_is_refused(tmp_path: Path):
    (tmp_path / "d.csv").write_text("a,y\nx,1\nz,2\n")
    with pytest.raises(ConfigError, match=r"data\.subset = 'sst2' is not read by data\.source = \"files\""):
        check_source(_files(tmp_path / "d.csv").model_copy(update={"subset": "sst2"}))
    with pytest.raises(ConfigError, match=r"data\.path = .* only by \"wordnet\" and \"definitions\" and \"files\" and"):
        check_source(DataSection(path=str(tmp_path)))
