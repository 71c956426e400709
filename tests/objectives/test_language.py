"""Which tokens a generative objective learns, and that its losses are transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlab.config import RunConfig
from fedlab.config.sections import ObjectiveSection
from fedlab.errors import ConfigError
from fedlab.objectives import OBJECTIVES, CausalLM, Instruction, Seq2Seq
from fedlab.objectives.base import NO_LOSS
from fedlab.objectives.instruction import _cut


def written(*answers: str) -> np.ndarray:
    array = np.empty(len(answers), dtype=object)
    array[:] = answers
    return array


@pytest.fixture(scope="module")
def chat(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def plain(tokenizer_files: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_files)


def learnt(row: dict[str, list[list[int]]], tokenizer: Any, i: int = 0) -> str:
    return str(tokenizer.decode([t for t in row["labels"][i] if t != NO_LOSS]))


def test_an_answer_and_its_end_are_learnt_and_nothing_else(chat: Any):
    """The end of a turn is the padding token too: masked by position."""
    assert chat.pad_token_id == chat.eos_token_id
    row = Instruction().encode(["the old wave"], None, written("wave old"), chat, 64)
    assert learnt(row, chat) == "wave old<|im_end|>"
    assert row["input_ids"][0][-1] == chat.eos_token_id, "what the template writes after the end is left out"
    assert all(label in (NO_LOSS, token) for token, label in zip(row["input_ids"][0], row["labels"][0], strict=True))


def test_every_turn_of_the_assistant_is_learnt(chat: Any):
    messages = [
        {"role": "user", "content": "old"},
        {"role": "assistant", "content": "new"},
        {"role": "user", "content": "tide"},
        {"role": "assistant", "content": "wave"},
    ]
    row = Instruction().encode([json.dumps(messages)], None, written(""), chat, 99)
    assert learnt(row, chat) == "new<|im_end|>wave<|im_end|>"


def test_a_prompt_that_looks_like_a_conversation_is_a_prompt(chat: Any):
    """What a record is, its columns say, never its text."""
    told = json.dumps([{"role": "user", "content": "old"}, {"role": "assistant", "content": "new"}])
    row = Instruction().encode([told], None, written("tide"), chat, 256)
    assert learnt(row, chat) == "tide<|im_end|>"
    assert told in chat.decode(row["input_ids"][0])


def test_what_the_system_says_goes_before_conversations_that_do_not_say_it(chat: Any):
    turns = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "new"}]
    own = [{"role": "system", "content": "wave"}, *turns]
    rows = Instruction(system="tide").encode([json.dumps(turns), json.dumps(own)], None, written("", ""), chat, 99)
    for ids, said in zip(rows["input_ids"], ("tide", "wave"), strict=True):
        assert chat.decode(ids) == f"<|im_start|>system\n{said}<|im_end|>\n" + (
            "<|im_start|>user\nold<|im_end|>\n<|im_start|>assistant\nnew<|im_end|>"
        )


def test_answers_that_have_names_at_the_hub_are_those_names():
    """Classes of a hub's data set come as their names."""
    kept, names = Instruction.encode_labels(["yes", "no", "yes"], ("no", "yes"), "set")
    assert (kept.tolist(), names) == (["yes", "no", "yes"], ())


def test_a_template_of_the_run_and_a_tokenizer_without_one(chat: Any, plain: Any):
    own = Instruction(template="Q: {prompt}\nA: ", system="Be brief.")
    row = own.encode(["the tide"], None, written("a wave"), chat, 64)
    assert chat.decode(row["input_ids"][0]) == "Be brief.\n\nQ: the tide\nA: a wave<|im_end|>"
    assert learnt(row, chat) == "a wave<|im_end|>"
    bare = Instruction().encode(["the tide"], None, written("wave"), plain, 64)
    assert learnt(bare, plain) == "wave"
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        Instruction().encode([json.dumps([{"role": "user", "content": "a"}])], None, written(""), plain, 64)


def test_a_template_that_rewrites_its_beginning_is_refused(chat: Any):
    import copy

    odd = copy.deepcopy(chat)
    odd.chat_template = "{{ messages | length }}" + odd.chat_template
    with pytest.raises(ConfigError, match=r"set objective\.template"):
        Instruction().encode(["the tide"], None, written("wave"), odd, 64)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[7]['content'] }}", "no element 7"),
        ("{% for m in messages %}{{ m['content' }}{% endfor %}", "unexpected"),
        ("{{ 1 + messages[0]['content'] }}", "unsupported operand"),
        ({"rag": "{{ messages }}", "tools": "{{ messages }}"}, "no default specified"),
    ],
)
def test_a_template_that_refuses_or_fails_is_named_and_no_text_is_quoted(template: Any, reason: str, chat: Any):
    import copy

    odd = copy.deepcopy(chat)
    odd.chat_template = template
    with pytest.raises(ConfigError, match=r"system, user, assistant.*" + reason) as caught:
        Instruction(system="Be brief.").encode(["the tide"], None, written("wave"), odd, 64)
    assert "objective.template" in str(caught.value)
    assert "tide" not in str(caught.value)


def test_a_template_that_says_the_day_gives_the_same_tokens_on_every_day(chat: Any):
    import copy

    dated = copy.deepcopy(chat)
    dated.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}" + chat.chat_template
    )
    row = Instruction().encode(["the tide"], None, written("wave"), dated, 64)
    assert chat.decode(row["input_ids"][0]).startswith("26 Jul 2024")


def test_plain_text_is_learnt_whole_and_ends(chat: Any):
    row = CausalLM().encode(["the old wave", "tide"], None, written("", ""), chat, 64)
    assert chat.decode(row["input_ids"][1]) == "tide<|im_end|>"
    assert row["labels"][0] == [NO_LOSS, *row["input_ids"][0][1:]]
    cut = CausalLM().encode(["the old wave"], None, written(""), chat, 3)
    assert cut["input_ids"][0] == row["input_ids"][0][:3], "a text that is cut does not end"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.integers(0, 30), answer=st.integers(1, 30), longest=st.integers(2, 40))
def test_what_is_cut(prompt: int, answer: int, longest: int):
    """Never too long, never without an answer, the prompt's ends are kept, order is kept."""
    ids = list(range(prompt + answer))
    row, labels = _cut((ids, [NO_LOSS] * prompt + ids[prompt:]), longest)
    assert len(row) == len(labels) == min(longest, len(ids))
    assert row == sorted(row)
    kept = [label for label in labels if label != NO_LOSS]
    assert kept == ids[prompt : prompt + len(kept)], "an answer loses its end only"
    assert len(kept) >= min(answer, longest // 2)
    if prompt and longest - len(kept) >= 2:
        assert row[longest - len(kept) - 1 if len(ids) > longest else prompt - 1] == prompt - 1


@pytest.mark.parametrize("toml", ["causal_toml", "llama_toml", "t5_toml"])
def test_a_loss_is_that_of_transformers(toml: str, request: pytest.FixtureRequest):
    from fedlab.session import open_session

    session = open_session(RunConfig.parse(request.getfixturevalue(toml)).to_toml())
    model, data = session.model, session.data
    some = data.train("client-0")[:5]
    batch = data.batch(some, model.tokenizer.pad_token_id)
    with torch.no_grad():
        found = model.objective.per_example_loss(model, batch)
        for i in range(len(some)):
            row = data.batch(some[i : i + 1], model.tokenizer.pad_token_id)
            inputs = model.objective.inputs(model, row)
            assert float(found[i]) == pytest.approx(float(model.module(**inputs, labels=row["labels"]).loss), rel=1e-5)


def test_the_sum_is_the_mean_times_the_number_of_label_tokens(llama_toml: str):
    from dataclasses import replace

    from fedlab.session import open_session

    session = open_session(RunConfig.parse(llama_toml).to_toml())
    batch = session.data.batch(session.data.train("client-1")[:4], session.model.tokenizer.pad_token_id)
    counts = (batch["labels"] != NO_LOSS).sum(1)
    assert len(set(counts.tolist())) > 1
    with torch.no_grad():
        mean = session.model.objective.per_example_loss(session.model, batch)
        total = replace(session.model.objective, loss="sum").per_example_loss(session.model, batch)
    assert torch.allclose(total, mean * counts, rtol=1e-5)


def test_keys_that_an_objective_does_not_read_are_refused():
    for name, key, value in (
        ("classification", "loss", "sum"),
        ("classification", "system", "x"),
        ("causal-lm", "template", "{prompt}"),
        ("instruction", "labels", ("a", "b")),
    ):
        section = ObjectiveSection.model_validate({"name": name, key: value})
        with pytest.raises(ConfigError, match=f"objective.{key} is not read"):
            OBJECTIVES[name].of(section, (), ())
    with pytest.raises(ConfigError, match=r"has no \{prompt\}"):
        Instruction.of(ObjectiveSection(name="instruction", template="Q:"), (), ())
    assert Seq2Seq.of(ObjectiveSection(name="seq2seq", loss="sum"), (), ()).loss == "sum"
