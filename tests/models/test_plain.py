"""A saved adapter without fedlab: the same scores, the labels' names, and a run that fails where it is not so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from fedlab.lora.state import modules, with_residual
from fedlab.models import plain
from fedlab.models.adapters import initial_state
from fedlab.models.loading import _build as uncached
from fedlab.models.plain import load_plain, load_run, logits_gap, save_checked
from fedlab.objectives import Classification

NAMES = ("fruit", "metal", "ocean")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "run-directory.md"


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, overrides), out, quiet=True)


def random_state(loaded, lora, residual: int = 0, rank: int | None = None) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    state = {n: torch.randn(v.shape, generator=g) * 0.2 for n, v in initial_state(loaded, lora, 0).items()}
    for module in modules(state):
        m, n = len(state[f"{module}.lora_B"]), state[f"{module}.lora_A"].shape[1]
        if rank is not None:
            state[f"{module}.lora_A"] = torch.randn(rank, n, generator=g) * 0.2
            state[f"{module}.lora_B"] = torch.randn(m, rank, generator=g) * 0.2
        if residual:
            factors = torch.randn(m, residual, generator=g) * 0.1, torch.randn(residual, n, generator=g) * 0.1
            state = with_residual(state, module, *factors)
    return state


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt2", "tiny_sentence_encoder"])
@pytest.mark.parametrize(
    ("dtype", "residual", "rank"),
    [("float32", 0, None), ("float32", 3, None), ("float32", 0, 2), ("float32", 2, 6), ("bfloat16", 0, None)],
)
def test_plain_peft_gives_the_same_logits(
    kind: str,
    dtype: str,
    residual: int,
    rank: int | None,
    tiny_toml: str,
    tiny_bert: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
):
    text = tiny_toml.replace(str(tiny_bert), str(request.getfixturevalue(kind)))
    config = RunConfig.parse(text, [f"run.dtype={dtype}", "lora.target_modules=all-linear", "lora.rslora=true"])
    loaded = uncached.__wrapped__(config.model, config.lora, Classification(NAMES), dtype, "cpu")
    state = random_state(loaded, config.lora, residual, rank)
    save_checked(loaded, state, tmp_path / "adapter", config)
    again = load_plain(config.model, loaded.objective, tmp_path / "adapter", next(loaded.module.parameters()).dtype)
    gap, _ = logits_gap(again, loaded, state)
    assert gap <= (1e-5 if residual else 0.0), "without a residual not a bit differs, in 16 bits too"


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "classifier"])
def test_an_adapter_that_is_not_what_was_scored_fails_the_run_and_is_kept_aside(
    part: str, tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from safetensors.torch import load_file, save_file

    real = plain.save_adapter

    def wrong(loaded, state, path: Path) -> None:
        real(loaded, state, path)
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(n for n in tensors if part in n)
        save_file(tensors | {name: tensors[name] + 0.01}, file, metadata={"format": "pt"})

    monkeypatch.setattr(plain, "save_adapter", wrong)
    with pytest.raises(fedlab.RunFailed, match="plain peft loads another"):
        simulate(tiny_toml, tmp_path / "run", "run.rounds=1")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    assert "plain peft loads another" in result["reason"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert (tmp_path / "run" / "adapter.rejected").is_dir()
    monkeypatch.undo()
    assert fedlab.resume(tmp_path / "run", quiet=True).result["status"] == "completed"
    assert not (tmp_path / "run" / "adapter.rejected").exists()


def test_the_same_tensors_in_another_base_fail_the_run(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A base that is not what its files say (here: moved while the run went on) shows in the logits."""
    real = plain.load_base

    def moved(*args, **kwargs):
        base, head = real(*args, **kwargs)
        with torch.no_grad():
            base.bert.pooler.dense.bias.add_(0.1)
        return base, head

    monkeypatch.setattr(plain, "load_base", moved)
    with pytest.raises(fedlab.RunFailed, match="with plain peft its logits differ by"):
        simulate(tiny_toml, tmp_path / "run", "run.rounds=1")


def test_an_adapter_that_peft_cannot_load_fails_the_run(
    tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = plain.save_adapter

    def without(loaded, state, path: Path) -> None:
        real(loaded, state, path)
        (path / "adapter_model.safetensors").unlink()

    monkeypatch.setattr(plain, "save_adapter", without)
    with pytest.raises(fedlab.RunFailed, match="plain peft cannot load what was saved"):
        simulate(tiny_toml, tmp_path / "run", "run.rounds=1")


def test_personal_adapters_are_checked_too(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checked: list[str] = []
    real = plain.logits_gap
    monkeypatch.setattr(plain, "logits_gap", lambda p, m, s: checked.append("one") or real(p, m, s))
    run = simulate(tiny_toml, tmp_path / "run", "strategy.name=fedsa", "run.rounds=1", "privacy={unit='none'}")
    assert len(checked) == 4
    assert all((run.path / "personal" / f"client-{i}" / "adapter" / "labels.json").is_file() for i in range(3))


def test_a_pipeline_answers_with_the_labels_names(tiny_toml: str, tiny_bert: Path, tmp_path: Path):
    """By the code of docs/run-directory.md, from a directory that is called like the one there."""
    from transformers import AutoTokenizer, pipeline

    run = simulate(tiny_toml, tmp_path / "runs" / "mine", "run.rounds=1", "privacy={unit='none'}")
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for block in blocks:
        found: dict[str, object] = {}
        exec(block.replace('"runs/', f'"{tmp_path}/runs/'), found)
        model = found["model"]
        answer = pipeline(
            "text-classification",
            model=model.merge_and_unload(),
            tokenizer=AutoTokenizer.from_pretrained(tiny_bert),  # type: ignore[attr-defined]
        )("ripe apple with rust")
        assert answer[0]["label"] in NAMES
    assert len(blocks) == 2
    assert json.loads((run.path / "adapter" / "labels.json").read_text())["id2label"] == dict(
        zip("012", NAMES, strict=True)
    )
    card = (run.path / "adapter" / "README.md").read_text()
    assert '- 1: "metal"' in card
    assert "AutoPeftModelForSequenceClassification" in card


def test_a_sentence_encoder_loads_by_its_card(
    tiny_toml: str, tiny_bert: Path, tiny_sentence_encoder: Path, tmp_path: Path
):
    run = simulate(tiny_toml.replace(str(tiny_bert), str(tiny_sentence_encoder)), tmp_path / "run", "run.rounds=1")
    assert "load_run" in (run.path / "adapter" / "README.md").read_text()
    model = load_run(run.path)
    assert model.config.id2label == dict(enumerate(NAMES))
    with pytest.raises(fedlab.ConfigError, match="is no run directory"):
        load_run(tmp_path)
