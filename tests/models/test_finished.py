"""A finished run's model merged into its base, and asked: what transformers loads is what was scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fedlab
from fedlab.cli import app
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.models.finished import merge, open_run, prompts_of
from fedlab.models.loaded import LoadedModel
from fedlab.session import open_session

ONE = ["run.rounds=1", "evaluate.generations=2", "evaluate.new_tokens=4", "evaluate.clients=never"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture
def run_of(request: pytest.FixtureRequest, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """A function: name of a configuration's fixture, overrides → directory of a finished run, made once."""

    def made(toml: str, *overrides: str) -> Path:
        key = repr((toml, overrides))
        if key not in runs:
            path = tmp_path_factory.mktemp("run") / "run"
            fedlab.simulate(RunConfig.parse(request.getfixturevalue(toml), [*ONE, *overrides]), path, quiet=True)
            runs[key] = path
        return runs[key]

    return made


def loss_of(model: torch.nn.Module, run: Path) -> float:
    """Mean over examples of transformers' own loss on the run's test examples, one by one."""
    session = open_session(RunConfig.load(run / "run.toml").to_toml())
    data, total = session.data, 0.0
    with torch.no_grad():
        for i in data.test:
            row = data.batch(data.test[data.test == i], session.model.tokenizer.pad_token_id)
            inputs = session.model.objective.inputs(session.model, row)
            total += float(model(**inputs, labels=row["labels"]).loss)
    return total / len(data.test)


@pytest.mark.parametrize(
    ("toml", "auto", "overrides"),
    [
        ("llama_toml", "AutoModelForCausalLM", ()),
        ("llama_toml", "AutoModelForCausalLM", ("strategy.name=fedex", "privacy={unit='none'}")),
        ("causal_toml", "AutoModelForCausalLM", ()),
        ("t5_toml", "AutoModelForSeq2SeqLM", ()),
        ("tiny_toml", "AutoModelForSequenceClassification", ()),
    ],
)
def test_a_merged_model_is_the_adapted_one(toml: str, auto: str, overrides: tuple[str, ...], run_of, tmp_path: Path):
    import transformers

    run = run_of(toml, *overrides)
    found = merge(run, tmp_path / "out" / "model")
    plain = getattr(transformers, auto).from_pretrained(found).eval()
    assert loss_of(plain, run) == pytest.approx(loss_of(open_run(run).module, run), rel=1e-4)
    if auto != "AutoModelForSequenceClassification":
        base = getattr(transformers, auto).from_pretrained(RunConfig.load(run / "run.toml").model.name).eval()
        assert loss_of(base, run) != pytest.approx(loss_of(plain, run), rel=1e-5), "the adapter is in it"
    assert len(transformers.AutoTokenizer.from_pretrained(found))
    assert (found / "PRIVACY.md").read_text() == (run / "PRIVACY.md").read_text()
    card = (found / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    private = RunConfig.load(run / "run.toml").privacy.unit != "none"
    assert ("without differential privacy" in card) == (not private)
    assert not private or f"ε = {result['epsilon']:.4g}" in card
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model"], "nothing half written is left"
    assert len({p.stat().st_mode for p in found.iterdir()}) == 1, "whoever may read one file may read all"


def test_a_model_that_cannot_be_merged_is_refused_and_nothing_is_left(
    run_of, tmp_path: Path, tiny_sentence_encoder, request
):
    run = run_of("llama_toml")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    runner = CliRunner()
    for arguments, expected in (
        ([str(run), str(tmp_path / "there")], "is there already"),
        ([str(run), str(run / "merged")], "lies in the run directory"),
        ([str(tmp_path / "nothing"), str(tmp_path / "x")], "is no run directory"),
    ):
        done = runner.invoke(app, ["merge", *arguments])
        assert done.exit_code == 2
        assert expected in done.stderr
    assert (tmp_path / "there" / "file").read_text() == "mine"
    encoder = run_of("learnable_toml")
    done = runner.invoke(app, ["merge", str(encoder), str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "sentence encoder" in done.stderr
    assert not (tmp_path / "x").exists()


def test_answers_are_those_of_the_saved_adapter(run_of):
    run = run_of("llama_toml")
    model = open_run(run)
    [ids] = prompts_of(model, ["the old wave"])
    assert model.tokenizer.decode(ids) == "<|im_start|>user\nthe old wave<|im_end|>\n<|im_start|>assistant\n"
    wanted = model.module.generate(input_ids=torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    done = CliRunner().invoke(app, ["generate", str(run), "--prompt", "the old wave", "--new-tokens", "5", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said == {"prompt": "the old wave", "answer": model.tokenizer.decode(wanted, skip_special_tokens=True)}


def test_a_classifier_gives_no_text_and_an_empty_prompt_is_none(run_of):
    runner = CliRunner()
    done = runner.invoke(app, ["generate", str(run_of("tiny_toml")), "--prompt", "a"])
    assert done.exit_code == 2
    assert "gives no text" in done.stderr
    done = runner.invoke(app, ["generate", str(run_of("llama_toml")), "--prompt", " "])
    assert done.exit_code == 2
    assert "has no text" in done.stderr


def test_a_tokenizers_further_templates_can_be_read_by_others(llama_toml: str, tiny_llama: Path, tmp_path: Path):
    """They are saved in a directory; ``out`` may be a link."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": tokenizer.chat_template}
    shutil.copytree(tiny_llama, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    toml = llama_toml.replace(str(tiny_llama), str(tmp_path / "model"))
    fedlab.simulate(RunConfig.parse(toml, ONE), tmp_path / "run", quiet=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    found = merge(tmp_path / "run", tmp_path / "link")
    assert found == tmp_path / "out"
    for path in found.rglob("*"):
        assert bool(path.stat().st_mode & 0o100) == path.is_dir(), path
    assert sorted(AutoTokenizer.from_pretrained(found).chat_template) == ["default", "tools"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "labels.json", "adapter_config.json"])
def test_a_damaged_or_unfinished_run_is_refused(file: str, run_of, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(run_of("llama_toml"), run)
    whole = (run / "adapter" / file).read_bytes()
    (run / "adapter" / file).write_bytes(whole[: len(whole) // 2])
    runner = CliRunner()
    for arguments in (["merge", str(run), str(tmp_path / "x")], ["generate", str(run), "--prompt", "old"]):
        done = runner.invoke(app, arguments)
        assert (done.exit_code, "is damaged" in done.stderr) == (2, True), done.stderr
    (run / "adapter" / file).write_bytes(whole)
    (run / "result.json").unlink()
    done = runner.invoke(app, ["merge", str(run), str(tmp_path / "x")])
    assert (done.exit_code, "is not finished" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "x").exists()


def test_a_prompt_beyond_the_models_positions_is_refused(run_of, tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = open_run(run_of("llama_toml"))
    few = GPT2LMHeadModel(GPT2Config(vocab_size=420, n_embd=8, n_layer=1, n_head=1, n_positions=32))
    short = LoadedModel(few, model.tokenizer, model.device, model.objective)  # type: ignore[arg-type]
    assert len(prompts_of(short, ["old"])[0]) <= 32
    with pytest.raises(ConfigError, match="has positions for 32; shorten it"):
        prompts_of(short, ["old", "tide " * 40])
