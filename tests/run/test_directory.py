"""Run directories: their format, and what is said of one that another version wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.report.html import write_report
from fedlab.run.directory import FORMAT, RunDirectory


@pytest.fixture
def directory(tiny_toml: str, tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(RunConfig.parse(tiny_toml), tmp_path / "run")


def test_a_directory_says_its_format_and_opens_again(directory: RunDirectory):
    assert json.loads((directory.path / "environment.json").read_text())["format"] == FORMAT
    again = RunDirectory.open(directory.path)
    assert (again.config, again.run_id, again.result, again.finished) == (
        directory.config,
        directory.run_id,
        None,
        None,
    )


@pytest.mark.parametrize("action", [fedlab.resume, write_report, RunDirectory.open], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("change", "age"), [({"format": None}, "earlier"), ({"format": FORMAT + 1}, "later")])
def test_one_line_says_that_another_version_wrote_it(action, change: dict, age: str, directory: RunDirectory):
    file = directory.path / "environment.json"
    tree = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    old = (directory.path / "run.toml").read_text().replace("cache_hidden_states", "cache_prefix")
    (directory.path / "run.toml").write_text(old)  # what it is called there says nothing to the user
    with pytest.raises(ConfigError, match=f"was written by an? {age} version of fedlab .* cannot be resumed") as caught:
        action(directory.path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("status", "finished"), [("completed", True), ("budget-exhausted", True), ("failed", False)])
def test_a_run_that_ended_by_itself_is_finished(status: str, finished: bool, directory: RunDirectory):
    directory.write_json("result.json", {"status": status})
    assert (directory.finished is not None) == finished


def test_a_run_never_overwrites_another(directory: RunDirectory):
    with pytest.raises(ConfigError, match="exists and is not empty"):
        RunDirectory.create(directory.config, directory.path)
