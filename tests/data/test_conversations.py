"""Conversations as they stand in files of each kind: the same records, or a refusal with the line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedlab.config.data import DataSection
from fedlab.data.sources import load_corpus
from fedlab.errors import ConfigError

CHATS = [
    [{"role": "user", "content": "Wéll?"}, {"role": "assistant", "content": "Yes."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "d"},
    ],
]


def section(path: Path, **more: Any) -> DataSection:
    return DataSection.model_validate({"source": "files", "path": str(path), "messages": "chat", **more})


def jsonl(path: Path, values: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps({"id": i, "chat": value}) for i, value in enumerate(values)))
    return path


def test_one_record_in_every_kind_of_file(tmp_path: Path):
    turned = [[dict(reversed(list(m.items()))) for m in chat] for chat in CHATS]
    files = [jsonl(tmp_path / "a.jsonl", CHATS), jsonl(tmp_path / "b.jsonl", turned), tmp_path / "c.csv"]
    with files[2].open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["chat", "id"], *([json.dumps(chat), str(i)] for i, chat in enumerate(CHATS))])
    files.append(tmp_path / "d.parquet")
    parquet.write_table(pa.table({"chat": CHATS, "id": [0, 1]}), files[3])
    found = [load_corpus(section(path), 0, objective="instruction") for path in files]
    assert [json.loads(text) for text in found[0].texts] == CHATS
    for other in found[1:]:
        assert other.texts == found[0].texts
    assert found[0].labels.tolist() == ["", ""]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hello", "want a list of messages"),
        ([], "want a list of messages"),
        ([{"role": "user"}], "without role or content"),
        ([{"from": "human", "value": "a"}], "without role or content"),
        ([{"role": "tool", "content": "a"}], "none of system, user, assistant"),
        ([{"role": "user", "content": "secret"}], "the assistant says nothing"),
        ([{"role": "assistant", "content": "secret"}], "the assistant begins"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line_and_without_its_words(
    value: Any, expected: str, tmp_path: Path
):
    path = jsonl(tmp_path / "a.jsonl", [CHATS[0], value])
    with pytest.raises(ConfigError, match=expected) as caught:
        load_corpus(section(path), 0, objective="instruction")
    assert "line 2" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "hello" not in str(caught.value)


def test_a_row_without_one_is_refused_or_left_out(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [CHATS[0], None])
    with pytest.raises(ConfigError, match="1 of 2 rows have nothing in column 'chat', the conversation"):
        load_corpus(section(path), 0, objective="instruction")
    assert len(load_corpus(section(path, on_bad_row="drop"), 0, objective="instruction")) == 1


def test_other_objectives_and_other_columns_beside_it_are_refused(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", CHATS)
    with pytest.raises(ConfigError, match=r'read by objective.name = "instruction" alone'):
        load_corpus(section(path), 0, objective="classification")
    with pytest.raises(ConfigError, match=r'not read by objective.name = "causal-lm"'):
        load_corpus(section(path), 0, objective="causal-lm")
    with pytest.raises(ValueError, match="takes the place of text, context and label"):
        section(path, text="id")


def test_plain_text_needs_no_label(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}')
    data = DataSection.model_validate({"source": "files", "path": str(path), "text": "text"})
    assert load_corpus(data, 0, objective="causal-lm").texts == ["one", "two"]
    with pytest.raises(ConfigError, match=r"needs data.text and data.label: "):
        load_corpus(data, 0, objective="instruction")
    with pytest.raises(ConfigError, match=r"not read by objective.name"):
        load_corpus(data.model_copy(update={"label": "text"}), 0, objective="causal-lm")


def test_context_may_be_empty_and_a_prompt_may_not(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "input": "", "output": "Ho"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"text": "instruction", "context": "input", "label": "output"}
    data = DataSection.model_validate({"source": "files", "path": str(path), **columns})
    corpus = load_corpus(data, 0, objective="instruction")
    assert (corpus.texts, corpus.pairs, corpus.labels.tolist()) == (["Add.", "Hi"], ["1 2", ""], ["3", "Ho"])
    with pytest.raises(ConfigError, match=r"read by objective.name = .instruction. alone"):
        load_corpus(data, 0, objective="classification")
    turned = DataSection.model_validate({**data.model_dump(), "text": "input", "context": "instruction"})
    with pytest.raises(ConfigError, match="1 of 2 rows have nothing in column 'input', the text"):
        load_corpus(turned, 0, objective="instruction")
