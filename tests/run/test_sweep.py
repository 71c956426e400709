"""Several runs from one command: names, what is run again, failures that stay alone, one Ray for all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.run import launch
from fedlab.run.directory import RunDirectory
from fedlab.run.launch.sweep import combinations, report, sweep


@pytest.fixture
def config_file(tiny_toml: str, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_toml.replace("rounds = 3", "rounds = 1"))
    return path


def test_every_combination_has_a_name_that_says_what_differs(config_file: Path, tmp_path: Path):
    found = combinations([config_file], ["train.lr=0.1"], ["lora.rank=[2, 4]", 'strategy.name=["ffa", "fedsvd"]'])
    assert list(found) == [
        "lora.rank=2+strategy.name=ffa",
        "lora.rank=2+strategy.name=fedsvd",
        "lora.rank=4+strategy.name=ffa",
        "lora.rank=4+strategy.name=fedsvd",
    ]
    first = next(iter(found.values()))
    assert (first.lora.rank, first.strategy.name, first.train.lr) == (2, "ffa", 0.1)
    other = tmp_path / "other.toml"
    other.write_text(config_file.read_text())
    assert list(combinations([config_file, other])) == ["tiny", "other"]
    tables = combinations([config_file], [], ['data.partition=[{kind="iid"}, {kind="dirichlet", alpha=0.5}]'])
    assert [c.data.partition.kind for c in tables.values()] == ["iid", "dirichlet"]


@pytest.mark.parametrize("vary", ["train.lr", "train.lr=0.5", "train.lr=[]", "train.lr=[0.5", "train.lr=[0.5, 0.5]"])
def test_what_is_no_axis_is_refused(vary: str, config_file: Path):
    with pytest.raises(fedlab.ConfigError, match=r"--vary|two runs"):
        combinations([config_file], [], [vary])


def test_finished_runs_are_kept_cut_off_ones_resumed_and_failures_stay_alone(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    configs = combinations([config_file], [], ["train.lr=[0.5, 1e300, 0.25]"])
    found = sweep(configs, tmp_path / "sweep", quiet=True)
    good, bad, last = found.values()
    assert isinstance(bad, fedlab.RunFailed)
    assert isinstance(good, fedlab.Run)
    assert isinstance(last, fedlab.Run)
    assert report(found) == 4
    assert "failed" in capsys.readouterr().out
    shutil.rmtree(last.path)
    RunDirectory.create(
        launch.prepared(configs[last.path.name]), last.path
    )  # as if it had been killed before its first round ended
    calls: list[str] = []
    original = launch.resume
    monkeypatch.setattr(launch, "resume", lambda path, quiet: calls.append(path.name) or original(path, quiet))
    monkeypatch.setattr(launch, "simulate", lambda *a: pytest.fail("nothing is begun again"))
    again = sweep(
        {n: c for n, c in configs.items() if "e+300" not in n and "1e300" not in n}, tmp_path / "sweep", quiet=True
    )
    assert calls == [last.path.name]
    assert [r.result["adapter_digest"] for r in again.values()] == [
        good.result["adapter_digest"],
        last.result["adapter_digest"],
    ]
    with pytest.raises(fedlab.ConfigError, match="another configuration"):
        sweep({good.path.name: RunConfig.load(config_file, ["train.lr=0.125"])}, tmp_path / "sweep", quiet=True)


def test_all_are_checked_before_the_first_starts(config_file: Path, tmp_path: Path):
    with pytest.raises(fedlab.ConfigError, match="did you mean fedsvd"):
        sweep(combinations([config_file], [], ['strategy.name=["ffa", "fedsvdd"]']), tmp_path / "sweep", quiet=True)
    assert not (tmp_path / "sweep").exists()


def test_the_command_prints_a_table(config_file: Path, tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "fedlab.cli",
        "simulate",
        str(config_file),
        "--vary",
        "lora.rank=[1,2]",
        "--out",
        str(tmp_path / "s"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "[2/2] lora.rank=2" in done.stdout
    assert done.stdout.count("completed") >= 4, "each run's own line, and the table"


@pytest.mark.slow
def test_one_ray_serves_all_and_changes_no_bit(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fedlab.run.launch import ray as launcher

    started: list[int] = []
    original = launcher._start_ray
    monkeypatch.setattr(launcher, "_start_ray", lambda config: started.append(config.run.nodes) or original(config))
    settings = ["run.backend=ray", "run.rounds=2"]
    configs = combinations([config_file], settings, ["train.lr=[0.5, 0.25]", "run.nodes=[2]"])
    configs["failing"] = RunConfig.load(config_file, [*settings, "run.nodes=2", "train.lr=1e300"])
    configs["after"] = RunConfig.load(config_file, [*settings, "run.nodes=2", "train.lr=0.5", "lora.rank=2"])
    found = sweep(configs, tmp_path / "sweep", quiet=True)
    assert started == [2, 2], "one for the first two and the one that failed, whose processes are not used again"
    for name, run in found.items():
        if name == "failing":
            assert isinstance(run, fedlab.RunFailed)
            continue
        assert isinstance(run, fedlab.Run)
        alone = configs[name].model_copy(
            update={"run": configs[name].run.model_copy(update={"backend": "local", "nodes": 1})}
        )
        assert (
            fedlab.simulate(alone, tmp_path / f"alone-{name}", quiet=True).result["adapter_digest"]
            == run.result["adapter_digest"]
        )
    lines = (found["after"].path / "metrics.jsonl").read_text().splitlines()  # type: ignore[union-attr]
    assert len([line for line in lines if json.loads(line)["phase"] == "train"]) == 2
