"""The memory plan: what grows with what, what fits, and checkpointing, which changes nothing but memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.models.adapters import initial_state
from fedlab.session import Session, open_session
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining, Trained
from fedlab.train.memory import GB, MemoryPlan, plan_memory

CLIENTS = ["client-0", "client-1"]


def session_of(toml: str, *overrides: str) -> Session:
    return open_session(RunConfig.parse(toml, overrides).to_toml())


def plan_of(toml: str, *overrides: str, clients: int = 4) -> MemoryPlan:
    session = session_of(toml, *overrides)
    state = initial_state(session.model, session.config.lora, 0)
    return plan_memory(session, state, [n for n in state if n.endswith("lora_B") or n.startswith("head.")], clients)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit(
    model: str, dropout: float, tiny_toml: str, tiny_bert: Path, request: pytest.FixtureRequest
):
    toml = tiny_toml.replace(str(tiny_bert), str(request.getfixturevalue(model)))
    found = []
    for checkpointing in ("false", "true"):
        settings = [f"run.checkpointing={checkpointing}", f"lora.dropout={dropout}", "lora.target_modules='all-linear'"]
        session = session_of(toml, *settings)
        state = initial_state(session.model, session.config.lora, 0)
        names = [n for n in state if ".lora_" in n or n.startswith("head.")]
        members = [LocalTraining(c, state, session.plan(c)) for c in CLIENTS]
        found.append(train_cohort(session.model, session.data, members, names, session.config, 1))
    for client in CLIENTS:
        plain, saved = found[0][client], found[1][client]
        assert isinstance(plain, Trained)
        assert isinstance(saved, Trained)
        assert all(torch.equal(plain.update[n], saved.update[n]) for n in plain.update)


def test_what_grows_with_what(tiny_toml: str):
    plain = plan_of(tiny_toml)
    assert plan_of(tiny_toml, "data.max_length=8").row < 0.7 * plain.row
    assert plan_of(tiny_toml, "run.checkpointing=true").row < 0.8 * plain.row
    assert plan_of(tiny_toml, "lora.layers_to_transform=[1]").row < 0.8 * plain.row
    assert plan_of(tiny_toml, "lora.rank=2").client < 0.8 * plain.client
    assert plan_of(tiny_toml, "train.optimizer=adamw", "train.momentum=0.0").client > plain.client
    assert plan_of(tiny_toml, "train.physical_batch=16").total > plain.total
    assert plan_of(tiny_toml, clients=8).total > plain.total
    assert plain.clients == 4


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_models_that_read_the_end_of_a_text_can_be_measured(
    family: str, tiny_toml: str, tiny_bert: Path, tokenizer_files: Path, tmp_path: Path
):
    """Their heads look for the end-of-text token, which every text has and a row of equal numbers has not."""
    from transformers import AutoTokenizer, BartConfig, BartModel, T5Config, T5Model

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 2}
    if family == "bart":
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
        heads = {
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
        }
        model = BartModel(BartConfig(vocab_size=64, **sizes, **heads, **special, bos_token_id=2))
        targets = "['q_proj', 'v_proj']"
    else:
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        model, targets = T5Model(T5Config(vocab_size=64, **sizes, **special)), "['q', 'v']"
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer_files).save_pretrained(tmp_path / "model")
    found = plan_of(tiny_toml.replace(str(tiny_bert), str(tmp_path / "model")), f"lora.target_modules={targets}")
    assert found.row > 0


def test_as_many_clients_as_fit_and_an_error_where_none_does(tiny_toml: str):
    plain = plan_of(tiny_toml)
    needed = plain.total + 2 * plain.client
    tight = plan_of(tiny_toml, f"run.memory={needed / GB}", clients=64)
    assert 4 <= tight.clients <= 7
    assert tight.total <= needed
    with pytest.raises(
        ConfigError, match=r"one client needs .* \(run.memory\); lower train.physical_batch .* run.checkpointing = true"
    ):
        plan_of(tiny_toml, "run.memory=0.0001")


def test_a_run_splits_its_cohort_to_fit_says_so_and_resumes_with_the_same_split(
    tiny_toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    plain = plan_of(tiny_toml, clients=2)
    limit = f"run.memory={(plain.total + plain.client / 4) / GB}"
    sizes: list[int] = []
    original = train_cohort

    def watched(model, data, members, *args):
        sizes.append(len(members))
        return original(model, data, members, *args)

    monkeypatch.setattr("clients.train.train_cohort", watched)
    config = RunConfig.parse(tiny_toml, [limit, "run.rounds=1", "run.cohort=3"])
    fedlab.simulate(config, tmp_path / "run")
    assert sorted(sizes) == [1, 2], "three clients, of which two fit"
    assert "2 clients per pass" in capsys.readouterr().out


def test_the_plan_says_how_long_a_round_trains_and_how_many_logits_are_alive(tiny_toml: str, llama_toml: str):
    """Time grows with steps and with clients of a round; a classifier has no vocabulary."""
    settings = ["run.nodes=1", "run.threads=1"]
    plain, longer = plan_of(tiny_toml, *settings), plan_of(tiny_toml, *settings, "train.steps=3000")
    assert 0 < plain.seconds < 100
    assert longer.seconds > 50 * plain.seconds, "a thousand times as many steps, each timed anew"
    assert plain.loss == 0
    assert "training takes about" in str(plain)
    assert "logits" not in str(plain)
    words = plan_of(llama_toml, *settings)
    model = session_of(llama_toml).model
    assert words.loss == 8 * 64 * len(model.module.get_output_embeddings().weight) * 4, "all of them fit into a chunk"
    assert "logits of" in str(words)
    assert words.total == words.base + words.loss + (plain.total - plain.base) - int(
        1.6 * (plain.rows * plain.row + plain.clients * plain.client)
    ) + int(1.6 * (words.rows * words.row + words.clients * words.client))


def test_references_have_no_checkpointing(tiny_toml: str):
    with pytest.raises(ConfigError, match=r"checkpointing = true needs train\.gradients"):
        RunConfig.parse(tiny_toml, ["run.checkpointing=true", "train.gradients=hooks"])
