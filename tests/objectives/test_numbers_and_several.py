"""Regression and multi-label through a run: DP, a shared pass, hidden states, the audits, a stream, plain peft."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.models.loading import load_tokenizer
from fedlab.privacy.audit.run import audit_run
from fedlab.run.regenerate import regenerate
from fedlab.trainer_audit.empirical import empirical_audit

FRUIT, METAL, OTHER = ["apple", "pear", "plum"], ["iron", "zinc", "rust"], ["the", "old", "new"]
PLAIN = "privacy={unit='none'}"
NAMES = ("regression", "multi-label")
pytestmark = pytest.mark.usefixtures("drawn_once")


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 300 texts with the share of fruit less a half, and a list of what is in them."""
    rng, path = np.random.default_rng(7), tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    lines = []
    for _ in range(300):
        count, kinds = int(rng.integers(3, 8)), [kind for kind in (FRUIT, METAL) if rng.random() < 0.5]
        words = [str(rng.choice((kinds or [OTHER])[int(rng.integers(len(kinds) or 1))])) for _ in range(count)]
        held = [name for name, kind in (("fruit", FRUIT), ("metal", METAL)) if set(words) & set(kind)]
        share = sum(word in FRUIT for word in words) / count - 0.5
        lines.append(json.dumps({"text": " ".join(words), "regression": round(share, 4), "multi-label": held}))
    path.write_text("\n".join(lines))
    return path


def configured(name: str, toml: str, tiny_data: Path, mixed_data: Path, *overrides: str) -> RunConfig:
    text = toml.replace(str(tiny_data), str(mixed_data))
    own = [f"objective.name={name}", f"data.label={name}", f"train.lr={0.05 if name == 'regression' else 0.2}"]
    return RunConfig.parse(text, [*own, *overrides])


def adapter(run: fedlab.Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_learnt(name: str, learnable_toml: str, tiny_data: Path, mixed_data: Path, tmp_path: Path):
    settings = ["strategy.name=fedavg", "run.rounds=6", "train.steps=8", "lora.layers_to_transform=[1]"]
    config = configured(name, learnable_toml, tiny_data, mixed_data, *settings)
    run = fedlab.simulate(config, tmp_path / "run", quiet=True)
    told = (json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines())
    first, *_, last = [line["scores"] for line in told if line["phase"] == "evaluate"]
    if name == "regression":
        assert last["rmse"] < 0.7 * first["rmse"]
        assert last["spearman"] > 0.6
        assert run.result["client_scores"]["worst"] == max(c["score"] for c in run.result["clients"].values())
    else:
        assert last["micro_f1"] > max(0.85, first["micro_f1"])
        assert last["loss"] < 0.7 * first["loss"]
    assert run.result["primary"] == {"regression": "rmse", "multi-label": "micro_f1"}[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_under_dp_each_way_of_training_ends_at_the_same_place(
    name: str, tiny_toml: str, tiny_data: Path, mixed_data: Path, tmp_path: Path
):
    ways = {
        "alone": ["run.cohort=1"],
        "together": ["run.cohort=3"],
        "hooks": ["train.gradients=hooks"],
        "opacus": ["train.gradients=opacus"],
        "kept": ["run.cache_hidden_states=true"],
    }
    shared = ["run.rounds=1", "lora.layers_to_transform=[1]"]
    runs = {
        way: fedlab.simulate(
            configured(name, tiny_toml, tiny_data, mixed_data, *shared, *settings), tmp_path / way, quiet=True
        )
        for way, settings in ways.items()
    }
    for way, run in runs.items():
        assert 0 < run.result["epsilon"] == runs["alone"].result["epsilon"]
        for tensor, value in adapter(run).items():
            assert torch.allclose(value, adapter(runs["alone"])[tensor], atol=1e-4), (way, tensor)
    assert not audit_run(runs["together"].path, regenerate=regenerate).findings


@pytest.mark.parametrize("name", NAMES)
def test_the_empirical_audit_finds_nothing(name: str, tiny_toml: str, tiny_data: Path, mixed_data: Path):
    config = configured(name, tiny_toml, tiny_data, mixed_data, "train.physical_batch=64")
    assert empirical_audit(config, canaries=150).findings == ()


@pytest.mark.parametrize("name", NAMES)
def test_plain_peft_and_a_pipeline_answer_as_the_run_scores(
    name: str, tiny_toml: str, tiny_data: Path, mixed_data: Path, tmp_path: Path
):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import pipeline

    from fedlab.session import open_session

    config = configured(name, tiny_toml, tiny_data, mixed_data, PLAIN, "run.rounds=1")
    run = fedlab.simulate(config, tmp_path / "run", quiet=True)
    told = json.loads((run.path / "adapter" / "labels.json").read_text())
    assert ("id2label" in told) == ('told["id2label"] =' in (run.path / "adapter" / "README.md").read_text())
    if "id2label" in told:
        told["id2label"] = {int(i): label for i, label in told["id2label"].items()}
    plain = AutoPeftModelForSequenceClassification.from_pretrained(run.path / "adapter", **told)
    tokenizer = load_tokenizer(config.model)
    answers = pipeline("text-classification", model=plain.merge_and_unload(), tokenizer=tokenizer, top_k=None)
    session = open_session((run.path / "run.toml").read_text())
    some = session.data.test[:4]
    batch = session.data.batch(some, tokenizer.pad_token_id)
    with torch.no_grad():
        logits = session.model.logits(batch)  # as the run left it
    texts = [json.loads(line)["text"] for line in mixed_data.read_text().splitlines()]
    for i, found in enumerate(answers([texts[j] for j in some])):
        if name == "regression":
            assert [a["score"] for a in found] == pytest.approx(logits[i].tolist(), abs=1e-5)
        else:
            own = {a["label"]: a["score"] for a in found}
            assert [own[label] for label in ("fruit", "metal")] == pytest.approx(logits[i].sigmoid().tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        pytest.param("regression", "own", marks=pytest.mark.slow),
        ("multi-label", "own"),
        pytest.param("multi-label", "shared", marks=pytest.mark.slow),
    ],
)
def test_a_stream(name: str, heads: str, learnable_toml: str, tiny_data: Path, mixed_data: Path, tmp_path: Path):
    renamed = tmp_path / "renamed.jsonl"
    text = mixed_data.read_text()
    renamed.write_text(text.replace('"metal"', '"ore"') if heads == "own" else text)
    tasks = f'\n[[tasks]]\nname = "a"\n[[tasks]]\nname = "b"\ndata = {{path = "{renamed}"}}\n'
    stream = ["strategy={name='fedavg'}", "run.rounds=2", "train.steps=8", f"stream.heads={heads}"]
    config = configured(name, learnable_toml + tasks, tiny_data, mixed_data, *stream)
    result = fedlab.simulate(config, tmp_path / "run", quiet=True).result
    assert result["matrix"][1][0] is not None
    if name == "multi-label":
        told = json.loads((tmp_path / "run" / "task-1-b" / "adapter" / "labels.json").read_text())["id2label"]
        own = ["a/fruit", "a/metal", "b/fruit", "b/ore"]
        assert list(told.values()) == (own if heads == "own" else ["fruit", "metal"])
        assert result["matrix"][1][1] > 0.6


def test_a_text_without_labels_counts_for_its_own_task_alone():
    from fedlab.objectives import MultiLabel

    objective = MultiLabel(("a/x", "a/y", "b/x"), (0, 0, 1))
    wanted, counts = objective.targets({"labels": torch.tensor([[0, 1, -100], [1, -100, -100]])})
    assert wanted.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert counts.tolist() == [[True, True, False], [False, False, True]]


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("regression", ["data.label=text"], r"300 of 300 rows .* is no finite number \(mixed.jsonl: line 1"),
        ("multi-label", ["data.partition={kind='dirichlet', alpha=0.5}"], "assigns by the one label of a text"),
        ("multi-label", ["objective.labels=['fruit']"], "has the label 'metal', which is not among the 1"),
        ("classification", ["data.label=multi-label"], "line 1: column .multi-label. holds a list"),
        ("regression", ["evaluate.evaluators=['multi-label']"], '"multi-label" cannot judge'),
    ],
)
def test_what_makes_no_sense_is_refused(
    name: str, settings: list[str], reason: str, tiny_toml: str, tiny_data: Path, mixed_data: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match=reason):
        fedlab.simulate(configured(name, tiny_toml, tiny_data, mixed_data, *settings), tmp_path / "run", quiet=True)
