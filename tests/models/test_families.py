"""Families of models: each trains and gives the run's scores in plain peft, or is refused with a reason that names it.

The default suite runs those that went wrong; the whole table is slow.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import families
import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from fedlab.session import open_session

NO_DEFAULT = 'lora.target_modules = "auto" knows no default for'
WITHOUT_DEFAULT = {"xlnet"}
# under DP: (family, target modules, head) → what the refusal says
REFUSED = {
    ("deberta", "all-linear", head): "pos_proj, pos_q_proj cannot tell texts apart" for head in ("train", "freeze")
} | {
    (family, targets, head): text
    for head in ("train", "freeze")
    for family, targets, text in (
        ("deberta-v2", "all-linear", "pos_key_proj, pos_query_proj cannot tell texts apart"),
        ("deberta-v3", "auto", "query_proj cannot tell texts apart"),
        ("deberta-v3", "all-linear", "key_proj, query_proj cannot tell texts apart"),
        ("opt", "all-linear", "fc1, fc2 cannot tell texts apart"),
        ("xlnet", "all-linear", "layer_1, layer_2.* cannot tell texts apart"),
    )
}
for how in ("auto", "all-linear"):
    REFUSED["modernbert", how, "train"] = "head.head.norm.weight belongs to a LayerNorm"
CELLS = [
    (family, targets, head, unit)
    for family in families.FAMILIES
    for targets in ("auto", "all-linear")
    for head in ("train", "freeze")
    for unit in ("example", "none")
]
QUICK = {  # what failed, or broke its promise, before
    ("roberta", "auto", "train", "example"),
    ("roberta", "auto", "freeze", "example"),
    ("electra", "auto", "freeze", "example"),
    ("xlnet", "all-linear", "train", "example"),
    ("xlnet", "all-linear", "train", "none"),
    ("deberta-v3", "auto", "freeze", "example"),
    ("deberta-v2", "all-linear", "train", "none"),
    ("t5", "auto", "train", "example"),
    ("bart", "auto", "freeze", "none"),
    ("gpt2", "auto", "train", "example"),
}


@pytest.fixture(scope="session")
def family_files(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path):
    """A function: family → its model directory, made once."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: families.save_family(family, tokenizer_files, root / family))


def config_of(tiny_toml: str, tiny_bert: Path, model: Path, *overrides: str) -> RunConfig:
    settings = ["run.rounds=2", "strategy.name=ffa", *overrides]
    return RunConfig.parse(tiny_toml.replace(str(tiny_bert), str(model)), settings)


@pytest.mark.parametrize(
    "cell", [pytest.param(c, id="-".join(c), marks=[] if c in QUICK else pytest.mark.slow) for c in CELLS]
)
def test_a_family_trains_and_reloads_or_is_refused_by_name(
    cell: tuple[str, str, str, str], family_files, tiny_toml: str, tiny_bert: Path, tmp_path: Path
):
    family, targets, head, unit = cell
    overrides = [f"lora.target_modules={targets}", f"train.head={head}"]
    overrides += ["privacy={unit='none'}"] if unit == "none" else []
    config = config_of(tiny_toml, tiny_bert, family_files(family), *overrides)
    if targets == "auto" and family in WITHOUT_DEFAULT:
        with pytest.raises(fedlab.ConfigError, match=NO_DEFAULT):
            fedlab.simulate(config, tmp_path / "run", quiet=True)
        return
    if unit == "example" and (family, targets, head) in REFUSED:
        with pytest.raises(fedlab.PrivacyError, match=REFUSED[family, targets, head]) as refusal:
            fedlab.simulate(config, tmp_path / "run", quiet=True)
        assert str(family_files(family)) in str(refusal.value)
        assert "lora.target_modules" in str(refusal.value)
        ledgers = (tmp_path / "run" / "ledger").rglob("*.jsonl")
        assert not any('"CHARGED"' in line for file in ledgers for line in file.read_text().splitlines())
        return
    run = fedlab.simulate(config, tmp_path / "run", quiet=True)
    assert run.result["status"] == "completed"
    assert run.result["excluded"] == 0
    assert plain_loss(run) == pytest.approx(run.result["scores"]["loss"], rel=1e-5, abs=1e-5)


def plain_loss(run: fedlab.Run) -> float:
    """Loss on the run's test texts of what AutoPeft makes of the adapter directory, with nothing of fedlab's."""
    from peft import AutoPeftModelForSequenceClassification

    told = json.loads((run.path / "adapter" / "labels.json").read_text())
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(run.path / "adapter"), **told).eval()
    data = open_session(RunConfig.load(run.path / "run.toml").to_toml()).data
    batch = data.tokens.batch(data.test, 0)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(data.test), 128):  # as evaluation does it: XLNet reads padding
            part = {name: value[start : start + 128] for name, value in batch.items()}
            logits = model(**{name: value for name, value in part.items() if name != "labels"}).logits
            total += float(torch.nn.functional.cross_entropy(logits, part["labels"], reduction="sum"))
    return total / len(data.test)


def test_a_head_of_layers_is_wrapped_once_and_saved_as_it_scores(
    family_files, tiny_toml: str, tiny_bert: Path, tmp_path: Path
):
    """RoBERTa's classifier: until now peft kept classifier and classifier.dense, and saved the unused copies."""
    from peft.utils import ModulesToSaveWrapper
    from safetensors.torch import load_file

    from fedlab.models.adapters import initial_state, save_adapter
    from fedlab.models.loading import _build as uncached
    from fedlab.objectives import Classification

    config = config_of(tiny_toml, tiny_bert, family_files("roberta"))
    loaded = uncached.__wrapped__(config.model, config.lora, Classification(("f", "m", "o")), "float32", "cpu")
    kept = [name for name, module in loaded.module.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert kept == ["base_model.model.classifier"]
    state = initial_state(loaded, config.lora, 0)
    save_adapter(loaded, state, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    heads = {f"head.{n.removeprefix('base_model.model.')}": v for n, v in saved.items() if "classifier" in n}
    assert heads.keys() == {n for n in state if n.startswith("head.")}
    assert all(torch.equal(heads[name], state[name]) for name in heads)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "t5", "bart", "xlnet", "gpt2"])
def test_a_checkpoint_that_brings_its_head_reloads_too(
    family: str, family_files, tiny_toml: str, tiny_bert: Path, tmp_path: Path
):
    """A fine-tuned model with as many labels: nothing of it is fresh, and the head is found by its name."""
    import transformers

    from fedlab.models.adapters import initial_state
    from fedlab.models.loading import _build as uncached
    from fedlab.models.plain import save_checked
    from fedlab.objectives import Classification

    whole = transformers.AutoModelForSequenceClassification.from_pretrained(family_files(family), num_labels=3)
    whole.save_pretrained(tmp_path / family)
    transformers.AutoTokenizer.from_pretrained(family_files(family)).save_pretrained(tmp_path / family)
    config = config_of(tiny_toml, tiny_bert, tmp_path / family, "lora.target_modules=all-linear")
    loaded = uncached.__wrapped__(config.model, config.lora, Classification(("f", "m", "o")), "float32", "cpu")
    state = initial_state(loaded, config.lora, 0)
    assert any(name.startswith("head.") for name in state)
    save_checked(loaded, state, tmp_path / "adapter", config)
