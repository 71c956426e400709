"""Label names are agreed by all: a simulation writes those of its data down, and renumbering them changes no score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.data import corpus_and_shards
from fedlab.errors import LabelError
from fedlab.run.launch import prepared

NAMED = 'objective.labels=["ocean", "fruit", "metal", "wood"]'


def test_a_simulation_writes_the_names_of_its_labels_down(tiny_toml: str, tmp_path: Path):
    config = RunConfig.parse(tiny_toml, ["privacy={unit='none'}", "run.rounds=1"])
    assert prepared(config).objective.labels == ("fruit", "metal", "ocean")
    run = fedlab.simulate(config, tmp_path / "run", quiet=True)
    written = RunConfig.load(run.path / "run.toml")
    assert written.objective.labels == ("fruit", "metal", "ocean")
    again = fedlab.simulate(written, tmp_path / "again", quiet=True)
    assert again.result["adapter_digest"] == run.result["adapter_digest"]


def test_labels_are_numbered_as_the_run_names_them_and_dealt_as_before(tiny_toml: str):
    before, shards = corpus_and_shards(RunConfig.parse(tiny_toml))
    after, dealt = corpus_and_shards(RunConfig.parse(tiny_toml, [NAMED]))
    assert after.label_names == ("ocean", "fruit", "metal", "wood")
    assert [after.label_names[i] for i in after.labels] == [before.label_names[i] for i in before.labels]
    assert all(np.array_equal(shards.train[client], dealt.train[client]) for client in shards.train)


def test_a_label_that_is_not_named_is_refused(tiny_toml: str):
    with pytest.raises(LabelError, match=r"has the label 'metal', which is not among the 2 of objective\.labels"):
        corpus_and_shards(RunConfig.parse(tiny_toml, ['objective.labels=["fruit", "ocean"]']))
    with pytest.raises(fedlab.ConfigError, match="'fruit' is there twice"):
        RunConfig.parse(tiny_toml, ['objective.labels=["fruit", "ocean", "fruit"]'])


def test_in_a_simulation_the_log_says_why_a_client_failed(tiny_toml: str, tmp_path: Path):
    with pytest.raises(fedlab.RunFailed, match=r"diverged: its training diverged.*log\.txt"):
        fedlab.simulate(
            RunConfig.parse(tiny_toml, ["privacy={unit='none'}", "train.lr=1e38", "train.steps=6"]),
            tmp_path / "run",
            quiet=True,
        )
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "client-0: no update: Diverged: client-0: local training diverged" in log
    assert "local training diverged" not in (tmp_path / "run" / "metrics.jsonl").read_text(), "that came in messages"


@pytest.mark.parametrize("name", ["../../../x", "a/b", "", "server"])
def test_a_name_that_is_no_identifier_is_refused_in_the_configuration(name: str, tiny_toml: str):
    if name != "server":  # that is reserved for a client
        with pytest.raises(fedlab.ConfigError, match=r"run\.name"):
            RunConfig.parse(tiny_toml, [f"run.name='{name}'"])
    with pytest.raises(fedlab.ConfigError):
        RunConfig.parse(tiny_toml, [f"tasks=[{{name='../{name}'}}]"])
