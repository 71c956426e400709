"""What goes wrong with language models alone: position bias that layers share, caches of keys while training, experts,
16-bit bases, dropout of a base, and blocks that are stepped over or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import generative
import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.evaluate.generation import generate
from fedlab.lora.state import State
from fedlab.models.adapters import initial_state
from fedlab.models.trial import together, trial_rows
from fedlab.session import Session, open_session
from fedlab.train.check_gradients import try_gradients
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining, Trained
from fedlab.train.memory import plan_memory

Make = Callable[..., RunConfig]
CLIENTS = ["client-0", "client-1"]
UPPER = ["lora.layers_to_transform=[1]"]


def session_of(config: RunConfig) -> Session:
    return open_session(config.to_toml())


def moved(session: Session) -> State:
    """A state whose adapter is not at zero."""
    g = torch.Generator().manual_seed(0)
    start = initial_state(session.model, session.config.lora, 0)
    return {name: value + 0.1 * torch.randn(value.shape, generator=g) for name, value in start.items()}


def updates(config: RunConfig) -> dict[str, State]:
    """client → its update of a round of a shared pass."""
    session = session_of(config)
    state = moved(session)
    trainings = [LocalTraining(c, state, session.plan(c)) for c in CLIENTS]
    found = train_cohort(session.model, session.data, trainings, list(state), session.config, 1)
    return {client: trained.update for client, trained in found.items() if isinstance(trained, Trained)}


@pytest.mark.parametrize(
    "family", ["llama", "t5", "bart", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "mixtral", "mt5"))]
)
def test_checkpointing_changes_no_bit(family: str, config_of: Make):
    """T5 keeps keys and values unless it is told not to: a block that runs again would see them twice."""
    plain = updates(config_of(family, "train.steps=2"))
    again = updates(config_of(family, "train.steps=2", "run.checkpointing=true"))
    assert plain.keys() == again.keys() == set(CLIENTS)
    for client, update in plain.items():
        assert all(torch.equal(value, again[client][name]) for name, value in update.items())


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_checkpointing_takes_less_memory(family: str, config_of: Make):
    def row(*overrides: str) -> int:
        session = session_of(config_of(family, "lora.target_modules=all-linear", *overrides))
        state = initial_state(session.model, session.config.lora, 0)
        return plan_memory(session, state, list(state), 2).row

    assert row("run.checkpointing=true") < 0.8 * row()


def test_every_block_of_a_decoder_that_reads_an_adapted_encoder_is_computed_twice(config_of: Make):
    from fedlab.models.blocks import blocks_in_gradient
    from fedlab.models.loaded import PEFT_PREFIX

    model = session_of(config_of("t5", *UPPER)).model
    names = [PEFT_PREFIX + name for name in model.scale]
    found = blocks_in_gradient(model.module, names, "x")
    base = model.module.get_base_model()
    assert found == [*base.decoder.block, base.encoder.block[1]]
    only = [name for name in names if ".decoder." in name]
    assert blocks_in_gradient(model.module, only, "x") == [base.decoder.block[1]]


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_hidden_states_of_a_decoder_are_kept_or_not_with_equal_results(family: str, config_of: Make):
    plain = updates(config_of(family, *UPPER, "train.steps=2"))
    kept = updates(config_of(family, *UPPER, "train.steps=2", "run.cache_hidden_states=true"))
    for client, update in plain.items():
        for name, value in update.items():
            assert torch.allclose(value, kept[client][name], atol=1e-4 * float(value.abs().max())), name


def test_an_encoder_and_its_decoder_have_no_hidden_states_to_keep(config_of: Make):
    with pytest.raises(ConfigError, match=r"cache_hidden_states = true is for models with one stack .* = false"):
        session_of(config_of("t5", *UPPER, "run.cache_hidden_states=true"))


def test_t5_shares_its_position_bias_does_not_train_it_and_keeps_no_keys(config_of: Make):
    model = session_of(config_of("t5", "lora.target_modules=all-linear")).model
    assert not any("relative_attention_bias" in name or "lm_head" in name for name in model.scale)
    stacks = {name.split(".")[0] for name in model.scale}
    assert stacks == {"encoder", "decoder"}
    assert sum(".EncDecAttention." in name for name in model.scale) == 8, "cross-attention of both layers"
    batch = together(trial_rows(model), model.tokenizer.pad_token_id)
    assert model.outputs(batch).past_key_values is None


def test_a_bases_own_dropout_is_off_and_that_of_adapters_is_each_rows_own(config_of: Make):
    """T5's configuration says 0.1; engines agree row by row under adapters' masks."""
    config = config_of("t5", "lora.dropout=0.3")
    model = session_of(config).model
    assert model.module.config.dropout_rate == 0.1
    batch = together(trial_rows(model), model.tokenizer.pad_token_id)
    assert torch.equal(model.objective.per_example_loss(model, batch), model.objective.per_example_loss(model, batch))
    for engine in ("fused", "hooks", "opacus"):
        verdict = try_gradients(model, list(model.parameters), engine)
        assert verdict.layout is None
        assert verdict.difference is None


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize(
    "family", ["t5", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "gpt2", "bart", "mixtral", "phi"))]
)
def test_a_16_bit_base_trains_and_reloads(family: str, config_of: Make, tmp_path: Path):
    """The run ends by loading its adapter in plain peft, in bfloat16, and comparing logits."""
    run = fedlab.simulate(config_of(family, "run.dtype=bfloat16"), tmp_path / "run", quiet=True)
    assert run.result["status"] == "completed"
    assert run.result["excluded"] == 0


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in ("gpt2", "bart") else pytest.mark.slow)
        for family in generative.GENERATIVE
    ],
)
def test_a_prompt_among_longer_ones_is_answered_as_alone(family: str, config_of: Make):
    """A decoder's prompts are padded where they begin, an encoder's where they end; positions count from the first
    token in both.
    """
    model = session_of(config_of(family)).model
    prompts = [[2, *range(4, 4 + length), 3] for length in (3, 9, 5)]
    assert generate(model, prompts, 8, 3) == generate(model, prompts, 8, 1)


def test_experts_cannot_be_named(config_of: Make):
    """ "all-linear" adapts what is linear; the experts' one parameter is fed the tokens of several examples."""
    with pytest.raises(ConfigError, match=r"'experts' matches no linear module \(model\.layers\.0\.mlp\.experts keeps"):
        session_of(config_of("mixtral", "lora.target_modules=['experts']"))
    model = session_of(config_of("mixtral", "lora.target_modules=all-linear")).model
    assert {name.rpartition(".")[2] for name in model.scale} == {"q_proj", "k_proj", "v_proj", "o_proj"}
