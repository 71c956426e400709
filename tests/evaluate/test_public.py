"""What a run says of public texts: general-ability drift, and answers to public prompts, sealed and shown as text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from fedlab.data.public import prompts, texts_at
from fedlab.errors import ConfigError
from fedlab.evaluate.generation import generate
from fedlab.evaluate.public import drift, sample_answers
from fedlab.privacy.audit.run import audit_run
from fedlab.run.regenerate import regenerate
from fedlab.session import open_session

TEXTS = ["the old wave and the new tide", "some ripe plum", "a reef", "iron under zinc, and rust"]
PROMPTS = ["apple pear <b>&</b>", "the deep tide"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "public.txt").write_text("\n\n".join(TEXTS))
    rows = [{"prompt": prompt, "kind": "a"} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "public.txt", tmp_path / "prompts.jsonl"


def asking(files: tuple[Path, Path]) -> list[str]:
    public, asked = files
    return [f"evaluate.drift={public}", f"evaluate.prompts={asked}", "evaluate.new_tokens=6"]


def test_drift_is_the_perplexity_of_each_token_after_the_first(files: tuple[Path, Path], llama_toml: str):
    session = open_session(RunConfig.parse(llama_toml, asking(files)).to_toml())
    tokenizer, nats, count, size = session.model.tokenizer, 0.0, 0, 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = session.model.module(input_ids=ids).logits.double()
        nats -= float(logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
        size += len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
    found = drift(session.model, session.config)
    assert (found["texts"], found["tokens"]) == (4, count)
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    few = RunConfig.parse(llama_toml, [*asking(files), "evaluate.drift_texts=2"])
    assert drift(session.model, few)["texts"] == 2


@pytest.mark.parametrize("toml", ["causal_toml", "t5_toml"])
def test_every_objective_that_generates_answers(toml: str, files: tuple[Path, Path], request: pytest.FixtureRequest):
    settings = [asking(files)[1], "evaluate.new_tokens=6"]
    session = open_session(RunConfig.parse(request.getfixturevalue(toml), settings).to_toml())
    model = session.model
    asked = model.objective.prompt_ids(PROMPTS[1], model.tokenizer)
    assert asked == model.objective.encode(PROMPTS[1:], None, None, model.tokenizer, 64)["input_ids"][0]
    found = sample_answers(model, session.config)
    assert [one["prompt"] for one in found] == PROMPTS
    assert all(isinstance(one["answer"], str) for one in found)


def test_a_run_keeps_seals_and_shows_both(
    files: tuple[Path, Path], llama_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted after round 1, too: what was measured before the first round is not lost."""
    import strategies.server.loop as loop

    original = loop.Rounds._round

    def interrupted(self: loop.Rounds, number: int) -> bool:
        if number == 2:
            raise KeyboardInterrupt
        return original(self, number)

    config = RunConfig.parse(llama_toml, [*asking(files), "run.rounds=2", "train.lr=5.0"])
    with monkeypatch.context() as patch:
        patch.setattr(loop.Rounds, "_round", interrupted)
        with pytest.raises(fedlab.Interrupted):
            fedlab.simulate(config, tmp_path / "run", quiet=True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "before the first round" in page
    run = fedlab.resume(tmp_path / "run", quiet=True)
    measured = run.result["drift"]
    assert list(measured) == ["before", "after"]
    assert measured["before"]["loss"] != measured["after"]["loss"]
    session = open_session((run.path / "run.toml").read_text())
    assert drift(session.model, config) == pytest.approx(measured["after"]), "of the model as the run left it"
    samples = json.loads((run.path / "samples.json").read_text())["samples"]
    assert [sample["prompt"] for sample in samples] == PROMPTS
    ids = [session.model.objective.prompt_ids(prompt, session.model.tokenizer) for prompt in PROMPTS]
    assert [sample["after"] for sample in samples] == generate(session.model, ids, 6, 8)
    assert all(isinstance(sample["before"], str) for sample in samples)
    page = (run.path / "report.html").read_text()
    assert "apple pear &lt;b&gt;&amp;&lt;/b&gt;" in page
    assert "<b>&</b>" not in page
    assert f"{measured['after']['perplexity']:.4f}" in page
    assert not (found := audit_run(run.path, regenerate=regenerate)).findings
    assert "samples.json" not in str(found.not_covered)
    (run.path / "samples.json").write_text('{"samples": []}')
    assert any("samples.json" in str(finding) for finding in audit_run(run.path, regenerate=regenerate).findings)


def test_what_cannot_be_measured_is_refused(files: tuple[Path, Path], tiny_toml: str, t5_toml: str, llama_toml: str):
    from fedlab.run.launch import check

    public, asked = files
    shared = llama_toml.replace('name = "fedsvd"', 'name = "fedsa"')
    for toml, settings, reason in (
        (tiny_toml, [f"evaluate.drift={public}"], r'evaluate.drift is the perplexity of plain text.*"classification"'),
        (tiny_toml, [f"evaluate.prompts={asked}"], "evaluate.prompts are answered by objectives that generate"),
        (t5_toml, [f"evaluate.drift={public}"], "needs a decoder alone"),
        (llama_toml, ["evaluate.drift=/none"], "evaluate.drift = '/none': no such file"),
        (shared, [f"evaluate.drift={public}"], "the server has no whole model to measure"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check(RunConfig.parse(toml, settings))


def test_the_clients_own_texts_are_not_public(llama_toml: str, tiny_data: Path, files: tuple[Path, Path]):
    from fedlab.run.launch import check

    for key in ("drift", "prompts"):
        with pytest.raises(ConfigError, match=rf"evaluate.{key} = .* the data of the clients"):
            check(RunConfig.parse(llama_toml, [f"evaluate.{key}={tiny_data}"]))


def test_files_of_prompts(tmp_path: Path):
    section = RunConfig.model_fields["evaluate"].default
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert prompts(section.model_copy(update={"prompts": str(tmp_path / "a.txt")})) == ["one", "two"]
    (tmp_path / "b.csv").write_text("text,prompt\nx,y\nz,w\n")
    assert texts_at("k", str(tmp_path / "b.csv"), "prompt") == ["y", "w"]
    assert texts_at("k", str(tmp_path / "b.csv")) == ["x", "z"]
    (tmp_path / "c.csv").write_text("q,r\nx,y\n")
    with pytest.raises(ConfigError, match='want a column "prompt" or "text", or one column of strings'):
        texts_at("evaluate.prompts", str(tmp_path / "c.csv"), "prompt")
    (tmp_path / "d.txt").write_text("\n".join(map(str, range(65))))
    with pytest.raises(ConfigError, match="holds 65 prompts, and a report shows at most 64"):
        prompts(section.model_copy(update={"prompts": str(tmp_path / "d.txt")}))
