"""A second objective through everything: a run without and with DP, a shared pass, the audit, resume, a stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.privacy.audit.run import audit_run
from fedlab.trainer_audit.empirical import empirical_audit

PLAIN = "privacy={unit='none'}"


def simulate(toml: str, out: Path, *overrides: str) -> fedlab.Run:
    return fedlab.simulate(RunConfig.parse(toml, overrides), out, quiet=True)


def evaluations(run: fedlab.Run) -> list[dict]:
    found = (json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines())
    return [line["scores"] for line in found if line["phase"] == "evaluate"]


def adapter(run: fedlab.Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "adapter" / "adapter_model.safetensors")


def test_numbers_of_a_file_are_learnt_and_the_worst_client_has_the_largest_error(
    number_toml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = [PLAIN, "strategy.name=fedavg", "run.rounds=6", "train.steps=8"]
    run = fedlab.simulate(RunConfig.parse(number_toml, settings), tmp_path / "run")
    first, *_, last = evaluations(run)
    assert last["mean_absolute_error"] < 0.7 * first["mean_absolute_error"]
    result = run.result
    assert result["primary"] == "mean_absolute_error"
    assert result["scores"] == last
    own = {client: info["score"] for client, info in result["clients"].items()}
    assert result["client_scores"]["worst"] == max(own.values()) > min(own.values())
    assert (run.path / "report.html").read_text().count("mean_absolute_error") >= 2
    assert "mean_absolute_error" in capsys.readouterr().out


def test_under_dp_a_shared_pass_ends_where_one_client_at_a_time_ends(number_toml: str, tmp_path: Path):
    alone, together, hooks = (
        simulate(number_toml, tmp_path / f"{i}", *settings, "run.rounds=2", "lora.dropout=0.2")
        for i, settings in enumerate((["run.cohort=1"], ["run.cohort=3"], ["train.gradients=hooks"]))
    )
    assert 0 < together.result["epsilon"] == alone.result["epsilon"]
    for name, value in adapter(together).items():
        assert torch.allclose(value, adapter(alone)[name], atol=2e-5), name
        assert torch.allclose(value, adapter(hooks)[name], atol=2e-5), name
    assert not audit_run(together.path).findings


def test_the_empirical_audit_finds_nothing(number_toml: str):
    audit = empirical_audit(RunConfig.parse(number_toml, ["train.physical_batch=64"]), canaries=200)
    assert audit.findings == ()
    assert audit.canaries == 200


def test_resume_gives_the_bits_of_an_unbroken_run(number_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import strategies.server.loop as loop

    whole = simulate(number_toml, tmp_path / "whole")
    original = loop.Rounds._round

    def interrupted(self: loop.Rounds, number: int) -> bool:
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Rounds, "_round", interrupted)
        with pytest.raises(fedlab.Interrupted):
            simulate(number_toml, tmp_path / "cut")
    resumed = fedlab.resume(tmp_path / "cut", quiet=True)
    for key in ("adapter_digest", "scores", "client_scores", "epsilon"):
        assert resumed.result[key] == whole.result[key], key


def test_hidden_states_are_kept_for_it_too(number_toml: str, tmp_path: Path):
    upper = ["lora.layers_to_transform=[1]", "run.rounds=1"]
    plain, kept = (
        simulate(number_toml, tmp_path / value, *upper, f"run.cache_hidden_states={value}")
        for value in ("false", "true")
    )
    for name, value in adapter(plain).items():
        assert torch.allclose(value, adapter(kept)[name], atol=1e-4), name


def test_a_stream_of_it_has_one_head_and_signs_that_mean_the_same(number_toml: str, tmp_path: Path):
    tasks = '\n[[tasks]]\nname = "few"\ndata = {limit = 120}\n[[tasks]]\nname = "all"\n'
    stream = [PLAIN, "strategy={name='fedavg'}", "run.rounds=3", "train.steps=8"]
    result = simulate(number_toml + tasks, tmp_path / "run", *stream).result
    before = json.loads((tmp_path / "run" / "task-0-few" / "task.json").read_text())["before"]
    R = result["matrix"]
    assert all(value is not None for row in R for value in row), "one head scores every task at any time"
    assert R[0][0] < before[0]
    assert result["forward_transfer"] > 0, "the error fell on a task before it came"
    assert result["backward_transfer"] == pytest.approx(R[0][0] - R[1][0])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["data.label=text"], "a label that is no number"),
        (["data.partition={kind='dirichlet', alpha=0.5}"], "assigns by label"),
        (["evaluate.evaluators=['classification']"], '"classification" cannot judge objective.name = "toy-regression"'),
    ],
)
def test_what_makes_no_sense_is_refused(settings: list[str], reason: str, number_toml: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=reason):
        simulate(number_toml, tmp_path / "run", *settings)


def test_class_patterns_have_no_meaning_without_classes(number_toml: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="this objective's labels have none"):
        simulate(
            number_toml + '\n[[tasks]]\nname = "a"\nlabels = ["0.*"]\n',
            tmp_path / "r",
            PLAIN,
            "strategy={name='fedavg'}",
        )
