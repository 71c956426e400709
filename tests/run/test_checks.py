"""What is wrong is found before a directory is made, and all of it is told at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError, FedlabError, PrivacyError
from fedlab.run.directory import RunDirectory
from fedlab.run.launch import check, load
from fedlab.run.launch.problems import Problems

UNREACHABLE = "privacy={unit='example', epsilon=1e-6, clip=1.0}"
WRONG = {
    "run.device=cuda:99": "run.device = 'cuda:99'",
    "lora.target_modules=['nope', 'query']": "lora.target_modules: 'nope' matches no linear module",
    "lora.rank=4000": "lora.rank = 4000 exceeds",
    "lora.layers_to_transform=[0, 7]": "no adapted module in layer 7",
    "train.batch_size=97": "train.batch_size = 97, but client-0 has 96 training examples",
    UNREACHABLE: "privacy.epsilon = 1e-06 at delta = 1e-05 cannot be reached",
    "strategy={name='fedsvd', foo=1, bar=2}": "unknown key strategy.foo",
    "model.name=./nowhere": "model.name = './nowhere'",
    "data.path=/nowhere.csv": "no such file",
    "data.clients=500": "only 360 examples",
    "evaluate.evaluators=['nope']": "evaluate.evaluators",
    "objective.name=nope": "objective.name",
    "clients.lr={nobody=2}": "nobody is none of the 3 clients",
}


@pytest.mark.parametrize("setting", WRONG)
def test_what_is_wrong_is_found_before_a_directory_is_made(setting: str, tiny_toml: str, tmp_path: Path):
    with pytest.raises(FedlabError) as caught:
        fedlab.simulate(RunConfig.parse(tiny_toml, [setting]), tmp_path / "run", quiet=True)
    assert WRONG[setting] in str(caught.value)
    assert caught.value.exit_code == (3 if setting == UNREACHABLE else 2)
    assert not (tmp_path / "run").exists()


def test_everything_wrong_is_told_at_once(tiny_toml: str, tmp_path: Path):
    together = [
        *(
            "run.device=cuda:99",
            "lora.target_modules=['nope', 'query']",
            "lora.rank=4000",
            "train.batch_size=97",
            UNREACHABLE,
        ),
        *("strategy={name='fedsvd', foo=1, bar=2}", "clients.lr={nobody=2}"),
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError) as caught:
        fedlab.simulate(RunConfig.parse(tiny_toml, together), tmp_path / "run", quiet=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == "9 problems; nothing was started"
    assert len(lines) == 10
    for setting in together:
        assert any(WRONG[setting] in line for line in lines), setting
    assert any("unknown key strategy.bar" in line for line in lines)
    assert any("exists and is not empty" in line for line in lines)


def test_wrong_keys_do_not_hide_what_else_is_wrong(tiny_toml: str, tmp_path: Path):
    path = tmp_path / "c.toml"
    path.write_text(tiny_toml)
    settings = ["train.stepz=3", "privacy.sigma=-1", "run.device=cuda:99", "lora.target_modules=['nope']", "run.cap=1"]
    with pytest.raises(ConfigError) as caught:
        load(path, [*settings, "train.batch_size=97"])
    lines = str(caught.value).splitlines()[1:]
    expected = ("train.stepz", "privacy.sigma", "run.cap", "run.device", "lora.target_modules", "train.batch_size")
    assert [sum(key in line for line in lines) for key in expected] == [1] * 6
    assert len(lines) == 6, "and nothing that follows from the wrong keys alone"


def test_one_problem_is_the_error_itself(tiny_toml: str):
    with pytest.raises(PrivacyError) as caught:
        check(RunConfig.parse(tiny_toml, [UNREACHABLE]))
    assert caught.value.problems == ()


def test_problems_are_told_once():
    found = Problems()
    for _ in range(2):
        found.add(ConfigError("a\nb"), lines=True)
    assert [str(one) for one in found.found] == ["a", "b"]
    assert found.of(lambda: 3) == 3
    assert found.fine(lambda: None)
    with pytest.raises(ConfigError, match="2 problems"):
        found.raise_all()


def started(tiny_toml: str, path: Path, status: str = "failed") -> RunDirectory:
    directory = RunDirectory.create(RunConfig.parse(tiny_toml), path)
    directory.write_json("result.json", {"status": status, "reason": "x"})
    (path / "log.txt").write_text("why\n")
    (path / "metrics.jsonl").write_text('{"phase": "event"}\n')
    (path / "ledger" / "keys").mkdir(parents=True)
    (path / "ledger" / "client-0.jsonl").write_text('{"type": "PLAN"}\n')
    return directory


@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_start_that_came_to_nothing_gives_its_directory_back(status: str, tiny_toml: str, tmp_path: Path):
    directory = started(tiny_toml, tmp_path / "run", status)
    before = directory.run_id
    again = RunDirectory.create(RunConfig.parse(tiny_toml, ["train.lr=0.25"]), tmp_path / "run")
    assert again.run_id != before
    assert again.config.train.lr == 0.25
    assert sorted(p.name for p in again.path.iterdir()) == ["environment.json", "log.txt", "run.toml"]
    assert (again.path / "log.txt").read_text() == "why\n", "why it failed stays"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ledger/client-0.jsonl", '{"type": "PLAN"}\n{"type": "CHARGE"}\n'),
        ("ledger/client-0.jsonl", "unreadable"),
        ("metrics.jsonl", '{"phase": "train"}\n'),
        ("checkpoints/latest.json", "{}"),
        ("mine.txt", "x"),
        ("result.json", '{"status": "completed"}'),
        ("result.json", None),
    ],
)
def test_whatever_holds_more_is_never_overwritten(name: str, text: str | None, tiny_toml: str, tmp_path: Path):
    path = started(tiny_toml, tmp_path / "run").path
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).unlink() if text is None else (path / name).write_text(text)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="exists and is not empty"):
        RunDirectory.create(RunConfig.parse(tiny_toml), path)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_run_that_failed_at_its_start_is_followed_by_the_corrected_one(tiny_toml: str, tmp_path: Path):
    """A failure that no check can foresee: training that diverges in round 1, without DP."""
    options = ["privacy={unit='none'}", "run.rounds=1"]
    with pytest.raises(FedlabError, match="diverged"):
        fedlab.simulate(RunConfig.parse(tiny_toml, [*options, "train.lr=1e38"]), tmp_path / "run", quiet=True)
    assert "diverged" in (tmp_path / "run" / "report.html").read_text()
    run = fedlab.simulate(RunConfig.parse(tiny_toml, options), tmp_path / "run", quiet=True)
    assert run.result["status"] == "completed"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"
