"""From a configuration to its data: what is imported for it, and what the number of clients may be left to."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fedlab.config import RunConfig
from fedlab.data import corpus_and_shards
from fedlab.data.partition import assign


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


@pytest.mark.parametrize(
    "change",
    [
        ["run.seed=4"],
        ["data.clients=4"],
        ["data.test_fraction=0.3"],
        ["data.partition={kind='linear'}"],
        ["data.partition={kind='dirichlet', alpha=5.0}"],
        ["data.partition={kind='dirichlet', alpha=5.0}", "data.min_client_size=60"],
        ["data.label=site"],
    ],
    ids=" ".join,
)
def test_a_partition_from_the_cache_is_the_one_that_was_asked_for(change: list[str], tiny_toml: str):
    """Whatever decides who holds what names the cached file: another run's partition is never taken for it."""
    corpus_and_shards(RunConfig.parse(tiny_toml))  # in the cache from here on
    corpus_and_shards(RunConfig.parse(tiny_toml, change[:1]))
    config = RunConfig.parse(tiny_toml, change)
    corpus, found = corpus_and_shards(config)
    wanted = assign(corpus, config.data, config.run.seed)
    assert found.clients == wanted.clients
    for client in wanted.clients:
        assert np.array_equal(found.train[client], wanted.train[client])
        assert np.array_equal(found.local_test[client], wanted.local_test[client])
    assert np.array_equal(found.test, wanted.test)
