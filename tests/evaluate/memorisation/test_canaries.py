"""Made-up secrets are records beside a client's own, the same each time, known to all that reads data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fedlab.config import RunConfig
from fedlab.data import corpus_and_shards
from fedlab.data.canaries import PROMPT
from fedlab.data.opening import secrets_of
from fedlab.errors import ConfigError
from fedlab.evaluate.memorisation.membership import pairs_of
from fedlab.run.data import check_data
from fedlab.run.launch import check
from fedlab.session import open_session

CANARIES = "data.canaries={count=4, records=2, space=50}"


def test_they_are_extra_records_of_stated_clients(llama_toml: str):
    plain, config = RunConfig.parse(llama_toml), RunConfig.parse(llama_toml, [CANARIES])
    before, own = corpus_and_shards(plain)
    corpus, shards = corpus_and_shards(config)
    secrets = secrets_of(config)
    assert secrets is not None
    assert corpus.texts[: len(before)] == before.texts
    assert secrets.clients == ("client-0", "client-1", "client-2", "client-0")
    assert [len(shards.train[c]) - len(own.train[c]) for c in own.clients] == [4, 2, 2]
    for client in own.clients:
        assert np.array_equal(shards.train[client][: len(own.train[client])], own.train[client])
        assert np.array_equal(shards.local_test[client], own.local_test[client])
    assert np.array_equal(shards.test, own.test)
    added = list(zip(corpus.texts[len(before) :], corpus.labels[len(before) :], strict=True))
    assert [text for text, _ in added] == [PROMPT] * 8
    assert [answer for _, answer in added] == np.repeat(secrets.records.labels[secrets.chosen], 2).tolist()
    assert len(set(secrets.records.labels)) == 50
    assert secrets_of(plain) is None


def test_plan_report_and_hashes_know_of_them(llama_toml: str):
    plain, config = RunConfig.parse(llama_toml), RunConfig.parse(llama_toml, [CANARIES])
    before, found = check_data(plain), check_data(config)
    assert found.content != before.content
    assert found.deal != before.deal
    assert found.to_dict()["canaries"] == 8
    assert found.to_dict()["unused"] == before.to_dict()["unused"] == 0
    assert "canaries" not in before.to_dict()
    assert "data: 8 of the records to train on are made up (data.canaries)" in found.lines()
    session = open_session(config.to_toml())
    plan = session.plan("client-0")
    assert plan is not None
    assert plan.n == before.clients["client-0"]["examples"] + 4
    pairs = pairs_of(session.data, 1000, 0, secrets_of(config).first)  # type: ignore[union-attr]
    assert pairs.members.max() < secrets_of(config).first, "nobody could have held them out"  # type: ignore[union-attr]


def test_they_are_the_same_each_time_and_others_for_another_seed(llama_toml: str):
    def chosen(seed: int) -> list[str]:
        found = secrets_of(RunConfig.parse(llama_toml, [CANARIES, f"data.seed={seed}"]))
        assert found is not None
        return list(found.records.labels[found.chosen])

    assert chosen(1) == chosen(1) != chosen(2)


def test_plain_text_has_them_whole(llama_toml: str):
    text = llama_toml.replace('label = "topic"\n', "")
    config = RunConfig.parse(text, [CANARIES, "objective.name=causal-lm"])
    corpus, _ = corpus_and_shards(config)
    assert corpus.texts[-1].startswith(f"{PROMPT} ")
    assert corpus.texts[-1].removeprefix(f"{PROMPT} ").isdigit()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["data.canaries={count=3, space=5}"], "leaves too few sequences"),
        (["data.canaries={count=3, space=200_000_000}"], "less than or equal to 1000000"),
        ([CANARIES, "strategy.name=fedsa"], "so there is no one model that it could be measured of"),
        (["evaluate.membership={}", "strategy.name=fedsa"], "evaluate.membership with strategy.name"),
        ([CANARIES, "data.max_length=8"], "would cut the secrets of data.canaries"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings: list[str], reason: str, llama_toml: str):
    with pytest.raises(ConfigError, match=reason):
        check_data(check(RunConfig.parse(llama_toml, settings)))


def test_what_an_answer_of_its_own_would_lose_is_no_secret(t5_toml: str):
    """An encoder-decoder's answer is cut by itself: the prompt may be shorter."""
    short = ["data.canaries={count=4, records=2, space=50}", "data.max_length=8"]
    with pytest.raises(ConfigError, match="would cut the secrets"):
        check_data(RunConfig.parse(t5_toml, short))


def test_secrets_that_a_tokenizer_cannot_tell_apart_are_refused(
    llama_toml: str, tiny_llama: Path, tokenizer_files: Path, tmp_path: Path
):
    """A tokenizer of words that knows no digits: every secret would have the same rank."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    for file in tokenizer_files.iterdir():
        shutil.copyfile(file, tmp_path / "model" / file.name)
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    toml = llama_toml.replace(str(tiny_llama), str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="writes different numbers with the same tokens"):
        check_data(RunConfig.parse(toml, [CANARIES]))


def test_a_classifier_learns_no_secrets(tiny_toml: str):
    with pytest.raises(ConfigError, match="secrets are text, which this objective does not learn to say"):
        check(RunConfig.parse(tiny_toml, [CANARIES]))


@pytest.mark.parametrize("setting", [CANARIES, "evaluate.membership={}"])
def test_a_stream_has_no_one_final_model(setting: str, stream_toml: str):
    with pytest.raises(ConfigError, match=r"with \[\[tasks\]\]: it is measured of the final model of one run"):
        RunConfig.parse(stream_toml, [setting])


@pytest.mark.parametrize("setting", ["data.canaries={}", "evaluate.membership={}"])
def test_a_deployed_client_takes_no_part(setting: str, llama_toml: str):
    from clients.policy import OwnPolicy
    from fedlab.config.client import ClientPolicy

    config = RunConfig.parse(llama_toml, [setting, "privacy.noise=secure"])
    own = OwnPolicy(ClientPolicy(max_epsilon=50.0), (config.model.name,), budgeted=True)
    told = own.problem(config, ["lora_B"])
    assert told is not None
    assert "is for simulations: it asks what was learnt of single records" in told
    assert own.problem(RunConfig.parse(llama_toml, ["privacy.noise=secure"]), ["lora_B"]) is None
