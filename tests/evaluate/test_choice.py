"""The answer that a model holds for the most probable, against one whole forward pass for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlab.config import RunConfig
from fedlab.data.collate import tokenise
from fedlab.data.corpus import Corpus, written
from fedlab.data.federated import FederatedData
from fedlab.errors import ConfigError
from fedlab.evaluate import evaluate, evaluators_of
from fedlab.evaluate.choice import answer_ids, likelihoods
from fedlab.evaluate.generation import prompt_and_answer
from fedlab.run.data import check_data
from fedlab.session import Session, open_session

CHOICES = ["fruit", "metal", "ocean"]
ASKED = ["evaluate.evaluators=['language', 'choice']", f"evaluate.choices={CHOICES}"]


def slow(session: Session, prompt: list[int], answer: list[int]) -> float:
    """log P(answer | prompt) from all logits of one pass."""
    model, pad = session.model.module, session.model.tokenizer.pad_token_id
    with torch.no_grad():
        if session.model.objective.shift:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        else:
            start = model.config.decoder_start_token_id
            fed = torch.tensor([[start if start is not None else pad, *answer[:-1]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=fed).logits[0]
    return float(logits.double().log_softmax(-1)[range(len(answer)), answer].sum())


@pytest.mark.parametrize("toml", ["llama_toml", "t5_toml"])
def test_likelihoods_are_those_of_whole_passes_and_decide(toml: str, request: pytest.FixtureRequest):
    session = open_session(RunConfig.parse(request.getfixturevalue(toml), ASKED).to_toml())
    model, data, some = session.model, session.data, session.data.test[:9]
    prompts, said = zip(*(prompt_and_answer(model, data, i) for i in some), strict=True)
    answers = [answer_ids(model.objective, model.tokenizer, choice) for choice in CHOICES]
    assert all(ids[-1] == model.tokenizer.eos_token_id for ids in answers)
    found = likelihoods(model, list(prompts), answers, 4)
    wanted = np.array([[slow(session, prompt, answer) for answer in answers] for prompt in prompts])
    assert found == pytest.approx(wanted, rel=1e-4)
    scores = evaluate(model, data, some, session.config)
    gold = np.array([CHOICES.index(text) for text in said])
    assert scores["choice_accuracy"] == pytest.approx((wanted.argmax(1) == gold).mean())
    assert scores["choice_accuracy_norm"] == pytest.approx((wanted.argmax(1) == gold).mean()), "all of five letters"


def test_length_counts_once_normalised_and_answers_that_are_no_choice_are_wrong(llama_toml: str):
    session = open_session(RunConfig.parse(llama_toml, ASKED).to_toml())
    model, choices = session.model, ["ocean", "a very long and winding answer about metal"]
    corpus = Corpus("c", ["old tide"] * 3, written([choices[0], choices[1], "neither"]))
    tokens = tokenise(corpus, model.tokenizer, 64, model.objective)
    data = FederatedData(tokens, session.data.shards)
    section = session.config.evaluate.model_copy(update={"choices": tuple(choices)})
    scores = evaluate(model, data, np.arange(3), session.config.model_copy(update={"evaluate": section}))
    answers = [answer_ids(model.objective, model.tokenizer, c) for c in choices]
    nats = likelihoods(model, [prompt_and_answer(model, data, 0)[0]], answers, 8)[0]
    assert nats[0] > nats[1], "a random model prefers the shorter"
    assert scores["choice_accuracy"] == pytest.approx(1 / 3)
    assert scores["choice_accuracy_norm"] == pytest.approx(1 / 3)


def test_answers_of_which_none_is_a_choice_are_told(llama_toml: str, caplog: pytest.LogCaptureFixture):
    session = open_session(RunConfig.parse(llama_toml, ASKED).to_toml())
    tokens = tokenise(
        Corpus("c", ["old tide"] * 2, written(["Ocean", "Metal"])), session.model.tokenizer, 64, session.model.objective
    )
    data = FederatedData(tokens, session.data.shards)
    section = session.config.evaluate.model_copy(update={"choices": ("ocean", "metal")})
    scores = evaluate(session.model, data, np.arange(2), session.config.model_copy(update={"evaluate": section}))
    assert scores["choice_accuracy"] == 0
    assert "none of the 2 answers scored is one of 'ocean', 'metal'" in caplog.text


def test_choices_are_needed_and_read_by_nothing_else(llama_toml: str):
    for settings in (ASKED[:1], ASKED[1:], [ASKED[0], "evaluate.choices=['one']"]):
        with pytest.raises(ConfigError, match="needs two answers or more"):
            evaluators_of(RunConfig.parse(llama_toml, settings))


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ('["", "fruit"]', "'' is no answer"),
        ('[" ", "fruit"]', "' ' is no answer"),
        ('["fruit", "fruit"]', "'fruit' and 'fruit' are one answer"),
        ('["fruit", "metal", "fruit "]', "'fruit ' and 'fruit' are one answer"),
        (f'["fruit", "{"apple " * 99}"]', r"leaves no room for a prompt in data\.max_length = 64 tokens"),
        ('["fruit", "<|im_end|>"]', "has no tokens for '<|im_end|>'"),
    ],
)
@pytest.mark.parametrize("toml", ["llama_toml", "t5_toml"])
def test_answers_that_could_not_be_chosen_are_refused_before_the_run(
    toml: str, choices: str, reason: str, request: pytest.FixtureRequest
):
    with pytest.raises(ConfigError, match=reason.replace("|", r"\|")):
        check_data(RunConfig.parse(request.getfixturevalue(toml), [ASKED[0], f"evaluate.choices={choices}"]))
