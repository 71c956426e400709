"""Bases in few bits: what they are refused for, and that they train as others do where their packages are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.models.adapters import initial_state
from fedlab.models.quantised import LIBRARIES, dense, kind_of, require_plain, shape_of, stored
from fedlab.run.launch import check
from fedlab.session import Session, open_session
from fedlab.train.check_gradients import try_gradients
from fedlab.train.memory import plan_memory

KINDS = [
    pytest.param(
        kind, marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")
    )
    for kind, library in LIBRARIES.items()
]
WIDE = "lora.target_modules=all-linear"
Make = Callable[..., RunConfig]


def session_of(config: RunConfig) -> Session:
    return open_session(config.to_toml())


@pytest.fixture
def wide(llama_toml: str, tmp_path: Path) -> Make:
    """A function: overrides → a Llama whose layers are wide enough to be packed, answering with topics."""
    import json

    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = RunConfig.parse(llama_toml)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    told = json.loads((Path(config.model.name) / "config.json").read_text())
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(told | sizes))).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    text = llama_toml.replace(config.model.name, str(tmp_path / "wide"))
    settings = ["run.rounds=1", "strategy.name=fedavg", WIDE, "evaluate.evaluators=['language']"]
    return lambda *overrides: RunConfig.parse(text, [*settings, *overrides])


@pytest.mark.parametrize(("kind", "library"), LIBRARIES.items())
def test_a_package_that_is_missing_is_named(kind: str, library: str, llama_toml: str, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else found(name, *a))
    with pytest.raises(ConfigError, match=f'model.quantize = "{kind}" needs the package {library}.* pip install'):
        check(RunConfig.parse(llama_toml, [f"model.quantize={kind}"]))


def test_a_head_is_not_quantised(tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="is for language models: this objective trains a head"):
        session_of(RunConfig.parse(tiny_toml, ["model.quantize=int8"]))


@pytest.mark.parametrize("strategy", ["fedex", "flora"])
def test_strategies_that_change_the_base_say_so(strategy: str, llama_toml: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedlab.models.quantised.check_quantiser", lambda model: None)
    config = RunConfig.parse(llama_toml, ["model.quantize=nf4", f"strategy.name={strategy}"])
    with pytest.raises(ConfigError, match=r'adds a residual to the base, whose weights model\.quantize = "nf4"'):
        check(config)


class Params4bit(nn.Parameter):
    """As bitsandbytes calls its own."""


def test_a_checkpoint_that_is_quantised_already_is_refused(llama_toml: str):
    layer = nn.Linear(8, 4)
    layer.weight = Params4bit(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert kind_of(layer) == "nf4"
    assert shape_of(layer) == (4, 8)
    model = RunConfig.parse(llama_toml).model
    with pytest.raises(ConfigError, match="its checkpoint is quantised already"):
        require_plain(nn.Sequential(layer), model)
    require_plain(nn.Sequential(nn.Linear(2, 2)), model)


def test_plain_weights_are_themselves():
    layer = nn.Linear(3, 2)
    assert dense(layer) is layer.weight
    assert shape_of(layer) == (2, 3)
    assert stored(layer.weight) == 24


@pytest.mark.parametrize("kind", KINDS)
def test_engines_agree_and_the_weights_stand_for_nearly_what_they_were(kind: str, wide: Make):
    plain = session_of(wide()).model
    before = {name: plain.pristine(name) for name in plain.scale}
    model = session_of(wide(f"model.quantize={kind}")).model
    assert model.scale.keys() == before.keys()
    for name, weight in before.items():
        assert kind_of(model.layer(name).base_layer) is not None
        gap = float((model.pristine(name) - weight).norm() / weight.norm())
        assert 0 < gap < {"nf4": 0.15, "int8": 0.01}[kind]
        assert model.leading_inputs(name, 4).shape == (4, weight.shape[1])
    for engine in ("fused", "hooks", "opacus"):
        verdict = try_gradients(model, list(model.parameters), engine)
        assert verdict.layout is None
        assert verdict.difference is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("drawn_once")
def test_a_private_run_ends_with_what_plain_peft_loads(kind: str, wide: Make, tmp_path: Path):
    """``AutoPeft`` is told of the quantisation by labels.json."""
    import json

    from peft import AutoPeftModelForCausalLM

    run = fedlab.simulate(wide(f"model.quantize={kind}"), tmp_path / "run", quiet=True)
    assert run.result["status"] == "completed"
    assert run.result["excluded"] == 0
    told = json.loads((run.path / "adapter" / "labels.json").read_text())
    model = AutoPeftModelForCausalLM.from_pretrained(str(run.path / "adapter"), **told)
    layers = [layer for layer in model.modules() if kind_of(layer) is not None]
    assert layers, "the base is quantised as it was for the run"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_quantised_base_cannot_do_is_refused(kind: str, wide: Make):
    upper = ["run.cache_hidden_states=true", "lora.layers_to_transform=[1]", f"model.quantize={kind}"]
    with pytest.raises(ConfigError, match=r"cache_hidden_states = true .* quantised ones"):
        session_of(wide(*upper))
    model = session_of(wide(f"model.quantize={kind}")).model
    name = next(iter(model.scale))
    state = initial_state(model, wide().lora, 0)
    m, n = shape_of(model.layer(name).base_layer)
    residual = {f"{name}.residual_B": torch.ones(m, 1), f"{name}.residual_A": torch.ones(1, n)}
    with pytest.raises(ValueError, match="whose weight is quantised"):
        model.load(state | residual)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_plan_counts_what_is_kept(kind: str, wide: Make):
    def base(*overrides: str) -> int:
        session = session_of(wide(*overrides))
        state = initial_state(session.model, session.config.lora, 0)
        return plan_memory(session, state, list(state), 1).base

    assert base(f"model.quantize={kind}") < 0.7 * base()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_too(kind: str, wide: Make, tmp_path: Path):
    run = fedlab.simulate(wide(f"model.quantize={kind}", "run.device=cuda"), tmp_path / "run", quiet=True)
    assert run.result["status"] == "completed"


def test_an_adapter_is_not_merged_into_few_bits(llama_toml: str, tmp_path: Path):
    """It would be rounded to them."""
    from fedlab.models.finished import merge

    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "labels.json").write_text("{}")
    (tmp_path / "run" / "run.toml").write_text(RunConfig.parse(llama_toml, ["model.quantize=int8"]).to_toml())
    (tmp_path / "run" / "result.json").write_text('{"status": "completed"}')
    with pytest.raises(ConfigError, match=r"would be rounded to them; load both with peft"):
        merge(tmp_path / "run", tmp_path / "out")
