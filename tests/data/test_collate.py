"""Tokens: padding, masks, the cache and its accidents."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedlab.data.cache import cached_arrays
from fedlab.data.collate import Tokens, by_length, tokenise
from fedlab.data.corpus import Corpus, written
from fedlab.errors import ConfigError
from fedlab.objectives import Classification, Instruction

CORPUS = Corpus(
    "c", ["apple pear", "iron", "wave tide reef salt coral", "plum"], np.array([0, 1, 2, 0]), ("f", "m", "o")
)
OBJECTIVE = Classification(CORPUS.label_names)


@pytest.fixture
def tokenizer(tokenizer_files: Path):
    return AutoTokenizer.from_pretrained(tokenizer_files)


def test_batches_are_what_the_tokenizer_pads(tokenizer):
    tokens = tokenise(CORPUS, tokenizer, 6, OBJECTIVE)
    indices = np.array([2, 0, 1])
    batch = tokens.batch(indices, tokenizer.pad_token_id)
    wanted = tokenizer(
        [CORPUS.texts[i] for i in indices], truncation=True, max_length=6, padding=True, return_tensors="pt"
    )
    assert torch.equal(batch["input_ids"], wanted["input_ids"])
    assert torch.equal(batch["attention_mask"], wanted["attention_mask"])
    assert batch["labels"].tolist() == [2, 0, 1]
    assert tokens.lengths(indices).tolist() == [6, 4, 3]


def test_pairs_carry_token_types(tokenizer_files: Path):
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_files, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    corpus = Corpus("c", CORPUS.texts, CORPUS.labels, CORPUS.label_names, pairs=["gold", "zinc ore", "a", "b"])
    batch = tokenise(corpus, tokenizer, 16, OBJECTIVE).batch(np.arange(4), tokenizer.pad_token_id)
    wanted = tokenizer(corpus.texts, corpus.pairs, padding=True, return_tensors="pt")
    assert torch.equal(batch["token_type_ids"], wanted["token_type_ids"])
    assert batch["token_type_ids"].max() == 1


def test_the_cache_is_used_mapped_and_keyed_by_what_matters(tokenizer, monkeypatch: pytest.MonkeyPatch):
    first = tokenise(CORPUS, tokenizer, 8, OBJECTIVE)
    assert isinstance(first.ids, np.memmap)
    import fedlab.data.collate as collate

    monkeypatch.setattr(collate, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    assert np.array_equal(tokenise(CORPUS, tokenizer, 8, OBJECTIVE).ids, first.ids)
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        tokenise(CORPUS, tokenizer, 7, OBJECTIVE)


SEQUENCES = Tokens(
    np.array([2, 9, 3, 2, 9, 8, 7, 3], dtype=np.int32),
    np.array([0, 3, 8]),
    np.array([5, 6, 7], dtype=np.int32),
    None,
    np.array([0, 1, 3]),
)


def test_sequences_of_labels_are_padded_where_there_is_no_loss():
    batch = SEQUENCES.batch(np.array([1, 0]), pad_id=0)
    assert batch["labels"].tolist() == [[6, 7], [5, -100]]
    assert batch["input_ids"].tolist() == [[2, 9, 8, 7, 3], [2, 9, 3, 0, 0]]
    assert SEQUENCES.label_bytes(np.array([0, 1])) != SEQUENCES.label_bytes(np.array([1, 0]))


def test_examples_that_are_taken_are_cut_with_their_labels():
    taken = SEQUENCES.take(np.array([1, 0, 1]), np.array([2, 9, 1]))
    batch = taken.batch(np.arange(3), pad_id=0)
    assert batch["attention_mask"].sum(1).tolist() == [2, 3, 1]
    assert batch["input_ids"].tolist() == [[2, 9, 0], [2, 9, 3], [2, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7], [5, -100], [6, -100]]


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9))
def test_pieces_by_length_hold_everybody_once_short_ones_first(lengths: list[int], size: int):
    pieces = list(by_length(np.array(lengths, dtype=np.int64), size))
    joined = [int(i) for piece in pieces for i in piece]
    assert sorted(joined) == list(range(len(lengths)))
    assert [lengths[i] for i in joined] == sorted(lengths)
    assert all(len(piece) == size for piece in pieces[:-1])


@pytest.mark.parametrize("change", [{"chat_template": "other"}, {"eos_token": "[CLS]"}])
def test_a_chat_template_and_an_end_of_text_are_part_of_the_cached_entry(change: dict[str, str], tokenizer_files: Path):
    """Base and instruct models of a family share a tokenizer and differ in these."""
    corpus = replace(CORPUS, labels=written(["a", "b", "c", "d"]), label_names=())
    answers = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    one = AutoTokenizer.from_pretrained(tokenizer_files, eos_token="[SEP]", chat_template=answers)
    if "chat_template" in change:
        change = {"chat_template": "iron " + answers}
    other = AutoTokenizer.from_pretrained(
        tokenizer_files, **({"eos_token": "[SEP]", "chat_template": answers} | change)
    )
    first, second = (tokenise(corpus, t, 12, Instruction()) for t in (one, other))
    fresh = Instruction().encode(corpus.texts, None, corpus.labels, other, 12)["input_ids"]
    assert second.ids.tolist() == [token for row in fresh for token in row]
    assert first.ids.tolist() != second.ids.tolist()


class CopiesLabels(Classification):
    """Labels are token sequences, as a language model has them: here the text's own words."""

    encoding = "copies"

    def encode(self, texts, pairs, labels, tokenizer, max_length):
        encoded = super().encode(texts, pairs, labels, tokenizer, max_length)
        rows = tokenizer([str(label) for label in labels], add_special_tokens=False)["input_ids"]
        return encoded | {"labels": rows}


def test_an_objective_may_make_token_sequences_of_labels_which_are_part_of_the_cached_entry(tokenizer):
    corpus = replace(CORPUS, labels=written(["pear", "iron ore", "salt", "plum"]))
    other = replace(corpus, labels=written(["pear", "iron", "salt", "plum"]))
    first, second = (
        tokenise(c, tokenizer, 8, CopiesLabels()).batch(np.arange(2), 0)["labels"] for c in (corpus, other)
    )
    assert first.shape == (2, 2)
    assert first[0, 1] == -100
    assert second.shape == (2, 1)
    assert torch.equal(first[:, 0], second[:, 0])


def _read_entry(seed: int) -> int:
    made = np.arange(20000)
    return int(cached_arrays("race", {"x": 1}, lambda: (time.sleep(seed % 5 / 500), {"a": made})[1])["a"].sum())


def test_many_processes_replace_a_damaged_entry_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path))
    context = multiprocessing.get_context("fork")
    with context.Pool(6) as pool:
        for _ in range(8):
            _read_entry(0)
            (file,) = (tmp_path / "race").rglob("a.npy")
            file.write_bytes(b"damaged")
            assert pool.map(_read_entry, range(12), chunksize=1) == [199990000] * 12
    assert [p.name for p in (tmp_path / "race").iterdir() if p.name.startswith(".")] == []


def test_a_cache_that_cannot_be_written_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set FEDLAB_CACHE"):
        cached_arrays("k", {"x": 1}, lambda: {"a": np.arange(3)})


@pytest.mark.parametrize("damage", ["[]", "{}", "not json"])
def test_a_damaged_index_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path))
    for _ in range(2):
        assert cached_arrays("k", {"x": 1}, lambda: {"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
        (index,) = tmp_path.rglob("whole.json")
        index.write_text(damage)


def test_a_damaged_entry_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path))
    made = []

    def make() -> dict[str, np.ndarray]:
        made.append(1)
        return {"a": np.arange(1000)}

    assert cached_arrays("k", {"x": 1}, make)["a"][7] == 7
    cached_arrays("k", {"x": 1}, make)
    assert len(made) == 1
    (file,) = tmp_path.rglob("a.npy")
    file.write_bytes(file.read_bytes()[:500])
    assert cached_arrays("k", {"x": 1}, make)["a"][999] == 999
    assert len(made) == 2
    assert cached_arrays("k", {"x": 1}, make)["a"][999] == 999
    assert len(made) == 2
    assert not [p for p in (tmp_path / "k").iterdir() if p.name.startswith(".")], "no temporary folder is left"
