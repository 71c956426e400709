"""What is said of a key: its meaning, what may stand there, its default; and the schema that editors read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fedlab.config import RunConfig
from fedlab.config.explain import explain
from fedlab.config.load import schema
from fedlab.errors import ConfigError
from strategies.hetlora import HetLoraOptions


def test_a_key_is_explained_from_its_field():
    said = explain(RunConfig, "train.lr")
    assert said.splitlines()[1:] == ["  range:   number > 0", "  default: required"]
    assert '"constant" | "linear" | "cosine"' in explain(RunConfig, "train.schedule")
    assert "number ≥ 0 and < 1" in explain(RunConfig, "train.momentum")


def test_a_section_is_all_its_keys_and_nothing_names_all():
    said = explain(RunConfig, "data.partition")
    assert [line.partition(":")[0] for line in said.splitlines() if line.startswith("data")] == [
        f"data.partition.{key}" for key in ("kind", "alpha", "column", "classes_per_client", "shards_per_client")
    ]
    assert explain(RunConfig, "train") in explain(RunConfig, "")


def test_a_strategys_own_keys_say_whose_they_are():
    said = explain(RunConfig, "strategy.prune", {"hetlora": HetLoraOptions})
    assert "(of hetlora)" in said
    with pytest.raises(ConfigError, match=r"did you mean strategy\.prune"):
        explain(RunConfig, "strategy.prun", {"hetlora": HetLoraOptions})


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key train\.lrr; did you mean train\.lr"):
        explain(RunConfig, "train.lrr")


def test_the_schema_knows_every_section_and_refuses_other_keys():
    found = json.loads(json.dumps(schema(RunConfig)))
    assert set(found["properties"]) == set(RunConfig.model_fields)
    assert found["$defs"]["TrainSection"]["properties"]["lr"]["exclusiveMinimum"] == 0
    assert found["$defs"]["TrainSection"]["additionalProperties"] is False


def test_the_command_prints_it():
    done = subprocess.run(
        [sys.executable, "-m", "fedlab.cli", "explain", "run.nodes"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, explain(RunConfig, "run.nodes").splitlines()[0])
