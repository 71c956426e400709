"""Prompts and answers from what is installed: functions and what they do, words and what they mean."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fedlab.config.data import DataSection
from fedlab.data import docstrings, pairs
from fedlab.data.sources import check_source, load_corpus
from fedlab.errors import ConfigError

SAID = "Return the sum of the two numbers."
SOURCE = f'''
def add(a, b):
    """{SAID}

    Nothing else.
    """
    return a + b  # a comment


class Here:
    async def add(self, a, b):
        """{SAID}"""
        return a + b


def silent(a):
    return a


def nothing_but_words():
    """{SAID}"""


def long(a):
    """{SAID}"""
    return "{"x" * 300}"
'''


def test_a_function_without_its_docstring_and_its_first_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(docstrings, "trees", lambda library: iter([ast.parse(SOURCE)] * 2))
    assert pairs._functions("any") == [
        ("def add(a, b):\n    return a + b", SAID),
        ("async def add(self, a, b):\n    return a + b", SAID),
    ]


def wordnet_at(path: Path) -> DataSection:
    lines = [
        "  1 a licence",
        '0 38 v 02 go_away 0 leave(p) 0 000 | depart from a place; "she left"',
        "1 38 v 01 go_away 0 000 | another meaning",
        "2 29 v 01 frown(a) 0 000 | wrinkle the brow",
        "3 29 v 01 nothing 0 000 | ",
    ]
    (path / "data.verb").write_text("\n".join(lines))
    return DataSection.model_validate({"source": "definitions", "subset": "verb", "path": str(path)})


def test_a_word_has_one_meaning_and_its_lexicographers_file_owns_it(tmp_path: Path):
    corpus = load_corpus(wordnet_at(tmp_path), 0, objective="instruction")
    assert corpus.texts == ["Define: go away", "Define: frown"]
    assert corpus.labels.tolist() == ["depart from a place", "wrinkle the brow"]
    assert corpus.natural == ["verb.motion", "verb.body"]


def test_no_other_column_names_owners(tmp_path: Path):
    data = wordnet_at(tmp_path)
    owner = data.partition.model_copy(update={"kind": "natural", "column": "library"})
    with pytest.raises(ConfigError, match="has one column of owners, 'lexname'"):
        check_source(data.model_copy(update={"partition": owner}))
