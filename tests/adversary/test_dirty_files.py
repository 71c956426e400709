"""Files as people have them: whatever is in them is read as it is written, or refused with file, line, cause and fix.

Every kind of table has the same rows here; what a run prints of them is tried by ``tests/run/test_data_report.py``.
"""

from __future__ import annotations

import csv
import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedlab.config.data import DataSection, Partition
from fedlab.data.corpus import Corpus
from fedlab.data.rows import alike
from fedlab.data.sources import check_source, load_corpus
from fedlab.errors import ConfigError

Rows = list[dict[str, Any]]
KINDS = ("csv", "tsv", "jsonl", "json", "parquet", "arrow", "stream.arrow")
TYPED = KINDS[2:]
WORDS = ("apple pear plum", "iron zinc rust", "wave reef tide", "the old thing", "sweet peel", "deep salt")
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def write(path: Path, rows: Rows) -> Path:
    """Rows as a file of the kind that the path's suffix names."""
    kind = path.suffix
    if kind in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if kind == ".csv" else "\t")
            writer.writerow(rows[0])
            writer.writerows(row.values() for row in rows)
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif kind == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if path.stem.endswith("stream") else pa.ipc.new_file
        with path.open("wb") as file, new(file, table.schema) as out:
            out.write_table(table)
    return path


def section(path: Path, **more: Any) -> DataSection:
    return DataSection(source="files", path=str(path), text="text", label="label", **more)


def read(path: Path, **more: Any) -> Corpus:
    return load_corpus(section(path, **more), 0)


def labels(corpus: Corpus) -> list[str]:
    return [corpus.label_names[i] for i in corpus.labels]


def attempt(path: Path) -> Corpus | str:
    """What is read, or what the refusal says."""
    try:
        return read(path)
    except ConfigError as error:
        return str(error)


def refused(path: Path, *words: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **more)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    return str(caught.value)


def rows_of(labels: list[Any], **more: list[Any]) -> Rows:
    return [
        {"text": f"{WORDS[i % len(WORDS)]} {i}", "label": label, **{name: values[i] for name, values in more.items()}}
        for i, label in enumerate(labels)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "codes",
    [["01", "1", "10"], ["1", "1.0", "1.00"], ["0x1", "1e0", "1"], ["true", "TRUE", "yes"], ["½", "1/2", "0.5"]],
)
def test_labels_owners_and_texts_are_strings_as_written(kind: str, codes: list[str], tmp_path: Path):
    rows = [{"text": codes[i % 3], "label": codes[i % 3], "owner": codes[(i + 1) % 3]} for i in range(12)]
    corpus = read(write(tmp_path / f"d.{kind}", rows), partition=Partition(kind="natural", column="owner"))
    assert labels(corpus) == corpus.texts == [row["label"] for row in rows]
    assert corpus.natural == [row["owner"] for row in rows]


@pytest.mark.parametrize("kind", TYPED)
@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 1, 10], ["0", "1", "10"]),
        ([0.0, 1.0, 2.5], ["0.0", "1.0", "2.5"]),
        ([True, False, True], ["true", "false", "true"]),
        ([2**60 + 1, -3, 0], [str(2**60 + 1), "-3", "0"]),
    ],
)
def test_numbers_and_truth_values_have_one_text(kind: str, values: list[Any], texts: list[str], tmp_path: Path):
    assert labels(read(write(tmp_path / f"d.{kind}", rows_of(values)))) == texts


def test_json_tells_an_integer_from_a_fraction_and_a_text(tmp_path: Path):
    assert labels(read(write(tmp_path / "d.jsonl", rows_of([1, 1.0, "1", "01"])))) == ["1", "1.0", "1", "01"]


def test_floats_of_32_bits_keep_their_digits(tmp_path: Path):
    table = pa.table({"text": ["a b", "c d"], "label": pa.array([0.1, 2.0], pa.float32())})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert labels(read(tmp_path / "d.parquet")) == ["0.1", "2.0"]


def test_dictionaries_and_dates_are_read(tmp_path: Path):
    import datetime

    days = [datetime.date(2026, 1, 2), datetime.date(2026, 1, 3)]
    table = pa.table({"text": ["a b", "c d"], "label": pa.array(["x", "01"]).dictionary_encode(), "day": days})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert labels(read(tmp_path / "d.parquet")) == ["x", "01"]
    data = section(tmp_path / "d.parquet").model_copy(update={"label": "day"})
    assert load_corpus(data, 0).label_names == ("2026-01-02", "2026-01-03")


CELL = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cf"], include_characters="\n"), min_size=1)


@pytest.mark.parametrize("kind", KINDS)
@given(
    rows=st.lists(
        st.tuples(CELL.filter(lambda t: any(c.isalnum() for c in t)), st.sampled_from(["a", "01", "1", "b,c", 'q"'])),
        min_size=2,
        max_size=8,
    )
)
@QUICK
def test_what_a_proper_writer_wrote_is_read_back(
    kind: str, rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("proper") / f"d.{kind}"
    corpus = attempt(write(path, [{"text": text, "label": label} for text, label in rows]))
    if isinstance(corpus, str):  # a field of several lines that are rows of their own is refused, never merged
        assert "holds rows of its own" in corpus
        return
    assert corpus.texts == [text for text, _ in rows]
    assert labels(corpus) == [label for _, label in rows]


@given(data=st.data())
@QUICK
def test_stray_quotes_never_merge_rows(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Quotes put anywhere into the texts of an unquoted file: as many rows as lines, or refused with a line."""
    delimiter = data.draw(st.sampled_from([",", "\t"]))
    count = data.draw(st.integers(4, 30))
    lines, where = [], data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=6))
    for i in range(count):
        text = WORDS[i % len(WORDS)]
        if i in where:
            at = data.draw(st.sampled_from([0, 0, 3, len(text)]))
            text = text[:at] + '"' + text[at:]
        lines.append(f"{text}{delimiter}{'fmo'[i % 3]}")
    path = tmp_path_factory.mktemp("stray") / ("d.csv" if delimiter == "," else "d.tsv")
    path.write_text("\n".join([delimiter.join(["text", "label"]), *lines]) + "\n")
    corpus = attempt(path)
    if isinstance(corpus, str):
        assert ", line " in corpus
        assert not any(word in corpus for word in WORDS), "no row is quoted"
        return
    assert len(corpus) == count
    assert labels(corpus) == ["fmo"[i % 3] for i in range(count)]


def test_a_quote_that_swallows_the_whole_file_is_refused(tmp_path: Path):
    (tmp_path / "d.csv").write_text('text,label\n"apple pear,f\niron zinc,m\nwave reef,o\nthe old thing",f\n')
    told = attempt(tmp_path / "d.csv")
    assert isinstance(told, str)
    assert "holds rows of its own" in told


def test_the_stray_quotes_of_a_tsv_are_text(tmp_path: Path):
    lines = [f"{chr(34) if i % 10 == 0 else ''}{WORDS[i % 6]} {i}\t{'fmo'[i % 3]}" for i in range(240)]
    (tmp_path / "d.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    corpus = read(tmp_path / "d.tsv")
    assert len(corpus) == 240
    assert corpus.texts[10] == '"sweet peel 10'


def test_a_quote_that_a_later_one_closes_is_refused(tmp_path: Path):
    lines = [f"{WORDS[i % 6]},{'fmo'[i % 3]}" for i in range(20)]
    lines[3], lines[9] = f'"{lines[3]}', lines[9].replace(",", '",')
    (tmp_path / "d.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    message = refused(tmp_path / "d.csv", "d.csv', line 5", "holds rows of its own", "Parquet")
    assert "iron" not in message


def test_texts_of_several_lines_with_the_delimiter_in_them_are_read(tmp_path: Path):
    rows = [{"text": f'Dear {w},\n"thanks",\nbye', "label": "ab"[i % 2]} for i, w in enumerate(WORDS)]
    for kind in ("csv", "tsv"):
        assert read(write(tmp_path / f"d.{kind}", rows)).texts == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", "text,label\na b,x\nc d,y,z\n", ["line 3", "3 field(s), but the header has 2", "quotes"]),
        ("d.csv", "text,label\na b,x\nc d\n", ["line 3", "1 field(s)"]),
        ("d.csv", 'text,label\n"a\nb",x\n"c d"e,y\n', ["line 4", "is followed by more text", "twice"]),
        ("d.csv", 'text,label\na b,x\n"c d,y\n', ["line 3", "never closed"]),
        ("d.csv", "text;label\na b;x\n", ["separated by semicolons", "commas"]),
        ("d.csv", "text\tlabel\na b\tx\n", ["separated by tabs", "call it .tsv"]),
        ("d.tsv", "text,label\na b,x\n", ["separated by commas", "call it .csv"]),
        ("d.csv", "text|label\na b|x\n", ["separated by vertical bars"]),
        ("d.csv", "text,label,text\na b,x,c\n", ["2 columns are called 'text'", "rename"]),
        (
            "d.csv",
            "a very long first row that is a text,x\nb,y\n",
            ["'text' is not in", "look like values (is the first line a header?)"],
        ),
        ("d.csv", "", ["no header", "empty"]),
        ("d.csv", "text,label\na\0b,x\n", ["line 2", "null byte"]),
        ("d.jsonl", '{"text": "a", "label": 1}\n{"text": "a" "label": 1}\n', ["line 2", "no valid JSON"]),
        ("d.jsonl", '{"text": "a", "label": 1}\n["a", 1]\n', ["line 2", "object per row"]),
        ("d.jsonl", '{"text": "a", "label": [1]}\n', ["line 1", "holds a list"]),
        ("d.jsonl", '{"text": "a", "text": "b", "label": 1}\n', ["line 1", "'text' twice"]),
        ("d.jsonl", '{"text": "a\\u0000", "label": 1}\n', ["line 1", "null character"]),
        ("d.jsonl", '{"text": "a\\ud800", "label": 1}\n', ["line 1", "surrogate"]),
        ("d.json", '[{"text": "a", "label": 1}\n{"text": "b", "label": 2}]', ["line 2", "want ',' or ']'"]),
        ("d.json", '[{"text": "a", "label": 1},', ["no valid JSON"]),
        ("d.json", '[{"text": "a", "label": 1}] x', ["more follows"]),
        ("d.json", '{"text": ["a", "b"], "label": [1, 2]}', ["holds a list"]),
        ("d.parquet", "text,label\na,b\n", ["no readable Parquet file"]),
        ("d.arrow", "text,label\na,b\n", ["no readable Arrow file"]),
    ],
)
def test_damage_is_refused_with_its_place_and_a_fix(name: str, content: str, words: list[str], tmp_path: Path):
    (tmp_path / name).write_bytes(content.encode())
    message = refused(tmp_path / name, name, *words)
    assert "a very long first row" not in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_byte_order_marks_are_no_text(kind: str, encoding: str, tmp_path: Path):
    path = write(tmp_path / f"d.{kind}", rows_of(["ä", "ö", "01"]))
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert labels(read(path)) == ["ä", "ö", "01"]


@pytest.mark.parametrize(
    ("encoded", "words"),
    [
        ("text,label\na b,x\ncafé,y\n".encode("latin-1"), ["line 3", "not UTF-8", "iconv"]),
        ("text,label\na b,x\n".encode("utf-16-le"), ["UTF-16 without a byte-order mark"]),
        ("text,label\nä b,x\n".encode("utf-16-be"), ["UTF-16 without a byte-order mark"]),
        ("text,label\na b,x\n".encode("utf-16")[:-1], ["cut off or damaged"]),
    ],
)
def test_other_encodings_are_refused(encoded: bytes, words: list[str], tmp_path: Path):
    (tmp_path / "d.csv").write_bytes(encoded)
    refused(tmp_path / "d.csv", *words)


def test_text_in_parquet_that_is_no_text_is_refused_with_its_row(tmp_path: Path):
    raw = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    parquet.write_table(pa.table({"text": raw, "label": ["a", "b"]}), tmp_path / "d.parquet")
    refused(tmp_path / "d.parquet", "row 2", "not UTF-8")


GAPS: dict[str, Callable[[str], list[Any]]] = {
    "empty": lambda kind: ["a", "", "b", " \t"],
    "null": lambda kind: ["a", None, "b", None],
    "nan among texts": lambda kind: ["a", "NaN", "b", "nan"],
    "NA among numbers": lambda kind: ["1", "NA", "0", "null"],
    "invisible": lambda kind: ["a", "\u200b", "b", "\ufeff\u00a0"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", GAPS)
def test_rows_without_a_label_are_refused_or_dropped_and_said(gap: str, kind: str, tmp_path: Path):
    path = write(tmp_path / f"d.{kind}", rows_of(GAPS[gap](kind)))
    place = "line 3, 5" if kind in ("csv", "tsv") else "line 2, 4" if kind == "jsonl" else "row 2, 4"
    refused(path, "2 of 4 rows have nothing in column 'label'", place, 'data.on_bad_row = "drop"')
    corpus = read(path, on_bad_row="drop")
    assert len(corpus) == 2
    assert corpus.reading is not None
    assert dict(corpus.reading.dropped) == {"no label in column 'label'": 2}
    assert corpus.reading.rows == 4


@pytest.mark.parametrize("kind", TYPED)
def test_a_number_that_is_none_is_no_class(kind: str, tmp_path: Path):
    path = write(tmp_path / f"d.{kind}", rows_of([1.0, float("nan"), 2.0]))
    refused(path, "1 of 3 rows have nothing in column 'label'")
    assert labels(read(path, on_bad_row="drop")) == ["1.0", "2.0"]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_nan_beside_strings_is_a_gap_and_no_message_of_a_parser(kind: str, tmp_path: Path):
    path = write(tmp_path / f"d.{kind}", rows_of(["a", float("nan"), "b"]))
    refused(path, "1 of 3 rows have nothing in column 'label'")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", ["text", "owner"])
def test_rows_without_a_text_or_an_owner_likewise(column: str, kind: str, tmp_path: Path):
    rows = [row | {"owner": f"s{i % 2}"} for i, row in enumerate(rows_of(["a", "b"] * 4))]
    rows[2][column] = " "
    path = write(tmp_path / f"d.{kind}", rows)
    natural = Partition(kind="natural", column="owner")
    refused(path, f"1 of 8 rows have nothing in column {column!r}", partition=natural)
    assert len(read(path, partition=natural, on_bad_row="drop")) == 7


def test_a_missing_key_is_a_gap(tmp_path: Path):
    (tmp_path / "d.jsonl").write_text('{"text": "a b", "label": "x"}\n{"text": "c d"}\n{"text": "e", "label": "y"}\n')
    refused(tmp_path / "d.jsonl", "1 of 3 rows", "line 2")


def test_na_among_words_is_a_class_and_warned_of(tmp_path: Path):
    corpus = read(write(tmp_path / "d.csv", rows_of(["EU", "NA", "EU", "NA"])))
    assert labels(corpus) == ["EU", "NA", "EU", "NA"]
    assert corpus.reading is not None
    assert any("'NA'" in text and "leave the field empty" in text for text in corpus.reading.warnings)


@pytest.mark.parametrize("kind", KINDS)
def test_white_space_around_labels_and_owners_goes_and_is_said(kind: str, tmp_path: Path):
    rows = rows_of([" fruit", "fruit", "metal\u00a0", "metal"], owner=["s1", "s1 ", "s2", "\ts2"])
    corpus = read(write(tmp_path / f"d.{kind}", rows), partition=Partition(kind="natural", column="owner"))
    assert labels(corpus) == ["fruit", "fruit", "metal", "metal"]
    assert corpus.natural == ["s1", "s1", "s2", "s2"]
    assert corpus.reading is not None
    assert dict(corpus.reading.stripped) == {"label": 2, "owner": 2}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Fruit", "fruit"),
        ("café", "cafe\u0301"),
        ("ﬁn", "fin"),
        ("a b", "a  b"),
        ("a\u200bb", "ab"),
        ("ß", "ss"),
        ("1", "1.0"),
    ],
)
def test_labels_that_look_alike_are_kept_apart_and_warned_of(one: str, other: str, tmp_path: Path):
    corpus = read(write(tmp_path / "d.jsonl", rows_of([one, other, "z"])))
    assert len(corpus.label_names) == 3
    assert corpus.reading is not None
    assert any(repr(one) in text and repr(other) in text for text in corpus.reading.warnings)


def test_leading_zeros_are_another_label_and_no_warning():
    assert alike(["01", "1", "10", "a"]) == []


@pytest.mark.parametrize("way", ["file", "link", "spelling", "directory"])
def test_a_test_file_in_the_training_directory_is_not_trained_on(way: str, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "one.csv", rows_of(["a", "b"] * 3))
    write(folder / "two.csv", [{"text": f"tested {i}", "label": "ab"[i % 2]} for i in range(4)])
    place = folder / "two.csv"
    if way == "link":
        place = tmp_path / "link.csv"
        place.symlink_to(folder / "two.csv")
    elif way == "spelling":
        place = tmp_path / "data" / ".." / "data" / "two.csv"
    elif way == "directory":
        place = tmp_path / "tests"
        place.mkdir()
        (place / "linked.csv").symlink_to(folder / "two.csv")
    corpus = read(folder, test_path=str(place))
    assert (len(corpus), corpus.test) == (10, 4)
    assert not any("tested" in text for text in corpus.texts[:6])
    assert corpus.reading is not None
    assert list(corpus.reading.left_out) == [str(folder / "two.csv")]


def test_other_splits_beside_a_training_file_are_not_trained_on(tmp_path: Path):
    for name in ("train.csv", "validation.csv", "test-1.csv", "testimony.csv"):
        write(tmp_path / name, [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(4)])
    assert {text.split(".")[0] for text in read(tmp_path).texts} == {"train", "testimony"}


def test_a_copy_of_a_test_file_in_the_training_directory_is_refused(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "one.csv", rows_of(["a", "b"] * 3))
    for place in (folder / "two.csv", tmp_path / "test.csv"):
        write(place, [{"text": f"tested {i}", "label": "ab"[i % 2]} for i in range(4)])
    refused(folder, "is a copy of", test_path=str(tmp_path / "test.csv"))


def test_a_test_directory_that_holds_the_training_file_is_refused(tmp_path: Path):
    write(tmp_path / "one.csv", rows_of(["a", "b"] * 3))
    with pytest.raises(ConfigError, match="would be trained on"):
        check_source(section(tmp_path / "one.csv", test_path=str(tmp_path)))


def test_hidden_files_and_suffixes_in_capitals(tmp_path: Path):
    write(tmp_path / "one.csv", rows_of(["a", "b"])).rename(tmp_path / "ONE.CSV")
    (tmp_path / "._ONE.CSV").write_bytes(b"\0\1junk")
    assert len(read(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_data_set_of_the_hub_is_read_as_it_is_written(kind: str, tmp_path: Path):
    codes = ["01", "1", "10"]
    write(tmp_path / f"train.{kind}", rows_of([codes[i % 3] for i in range(30)]))
    data = DataSection(source="hub", path=str(tmp_path), text="text", label="label")
    assert load_corpus(data, 0).label_names == ("01", "1", "10")


def test_classes_of_the_hub_have_their_names_and_rows_without_one_are_said(monkeypatch: pytest.MonkeyPatch):
    import datasets

    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    columns = {"text": ["a", "b", "c", "d"], "label": [0, 1, -1, 1]}
    made = datasets.Dataset.from_dict(columns, features=kinds)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": made})
    corpus = load_corpus(DataSection(source="hub", path="some/set", text="text"), 0)
    assert labels(corpus) == ["no", "yes", "yes"]
    assert corpus.reading is not None
    assert sum(corpus.reading.dropped.values()) == 1


@given(junk=st.binary(max_size=200), kind=st.sampled_from(KINDS))
@QUICK
def test_whatever_the_bytes_are_nothing_but_a_config_error_comes(
    junk: bytes, kind: str, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("junk") / f"d.{kind}"
    path.write_bytes(b"text,label\n" + junk if kind == "csv" else junk)
    if isinstance(found := attempt(path), str):
        assert f"d.{kind}" in found or "data:" in found


@given(st.text(string.printable, max_size=80))
@QUICK
def test_any_printable_csv_has_as_many_fields_as_its_writer_says(text: str):
    """The parser is csv's own in strict mode: what it accepts is what csv reads."""
    from fedlab.data.delimited import read_delimited

    try:
        table = read_delimited(Path("d.csv"), "text,label\n" + text, ",", ())
    except ConfigError:
        return
    expected = [row for row in csv.reader(io.StringIO("text,label\n" + text, newline="")) if row]
    assert [[a, b] for a, b in zip(table.columns["text"], table.columns["label"], strict=True)] == expected[1:]
