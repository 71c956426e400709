"""From a configuration to its data: what is imported for it, and what the number of clients may be left to."""

from __future__ import annotations

import subprocess
import sys

from fedlab.config import RunConfig
from fedlab.data import corpus_and_shards


def test_data_can_be_looked_at_before_torch_is_loaded():
    code = "import sys, fedlab.data, fedlab.data.sources; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_without_a_number_there_are_six_clients_or_as_many_as_are_named(tiny_toml: str):
    toml = tiny_toml.replace("clients = 3\n", "")
    assert corpus_and_shards(RunConfig.parse(toml))[1].clients == [f"client-{i}" for i in range(6)]
    named = RunConfig.parse(toml, ["data.partition={kind='natural', column='site'}"])
    assert not named.population_known
    shards = corpus_and_shards(named)[1]
    assert shards.clients == [f"site{i}" for i in range(5)]
    assert named.with_population(5).population == 5
