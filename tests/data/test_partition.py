"""Dealing: every example has one owner, the same seed deals the same, and nobody is left too small."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedlab.config.sections import DataSection, Partition
from fedlab.data.corpus import Corpus
from fedlab.data.partition import Shards, deal, describe
from fedlab.errors import ConfigError


def corpus(n: int = 300, test: int = 0) -> Corpus:
    labels = np.arange(n) % 5
    return Corpus(
        "c", [f"t{i}" for i in range(n)], labels, tuple("abcde"), natural=[f"s{i % 4}" for i in range(n)], test=test
    )


KINDS = [
    Partition(kind="iid"),
    Partition(kind="dirichlet", alpha=0.5),
    Partition(kind="natural", column="who"),
    Partition(kind="shard", shards_per_client=2),
    Partition(kind="pathological", classes_per_client=2),
    Partition(kind="linear"),
    Partition(kind="square"),
    Partition(kind="exponential"),
]


@pytest.mark.parametrize("partition", KINDS, ids=lambda p: p.kind)
def test_disjoint_complete_and_deterministic(partition: Partition):
    data = DataSection(clients=4, partition=partition, min_client_size=4, test_fraction=0.2)
    shards, again = deal(corpus(), data, 1), deal(corpus(), data, 1)
    everything = np.concatenate([*shards.train.values(), *shards.local_test.values()])
    assert len(set(everything.tolist())) == len(everything)
    if partition.kind == "pathological":  # leaves the classes that nobody drew to nobody; the others are dealt whole
        assert set(np.bincount(everything % 5, minlength=5).tolist()) <= {0, 60}
        assert all(len(set((p % 5).tolist())) <= 2 for p in shards.train.values())
        assert len(everything) >= 120
    else:
        assert len(everything) >= 300 - (7 if partition.kind == "shard" else 0)  # the remainder of 300 over 8 shards
    assert list(shards.train) == [f"client-{i}" for i in range(4)]
    assert sorted(shards.test.tolist()) == sorted(np.concatenate(list(shards.local_test.values())).tolist())
    for client in shards.train:
        assert np.array_equal(shards.train[client], again.train[client])
        assert len(shards.local_test[client]) == round(
            0.2 * (len(shards.train[client]) + len(shards.local_test[client]))
        )
    restored = Shards.from_arrays(shards.to_arrays())
    assert all(np.array_equal(restored.train[c], shards.train[c]) for c in shards.train)
    assert all(np.array_equal(restored.local_test[c], shards.local_test[c]) for c in shards.train)
    assert np.array_equal(restored.test, shards.test)


def test_another_seed_deals_differently():
    data = DataSection(clients=4, min_client_size=4)
    assert not np.array_equal(deal(corpus(), data, 1).train["client-0"], deal(corpus(), data, 2).train["client-0"])


def test_dirichlet_is_skewed_and_iid_is_not():
    def skew(partition: Partition) -> float:
        shards = deal(corpus(3000), DataSection(clients=4, partition=partition), 1)
        shares = [np.bincount(np.arange(3000)[p] % 5, minlength=5) / len(p) for p in shards.train.values()]
        return float(np.std(shares))

    assert skew(Partition(kind="dirichlet", alpha=0.1)) > 5 * skew(Partition(kind="iid"))


def test_dirichlet_leaves_enough_to_train_on_after_the_hold_out():
    data = DataSection(
        clients=4, partition=Partition(kind="dirichlet", alpha=0.3), min_client_size=30, test_fraction=0.2
    )
    for seed in range(12):  # dealing 30 instead of 37 at least, a quarter of the seeds are refused
        assert min(len(p) for p in deal(corpus(), data, seed).train.values()) >= 30


def test_dealing_leaves_the_caching_of_datasets_as_it_was():
    import datasets

    assert datasets.is_caching_enabled()
    deal(corpus(), DataSection(clients=4, min_client_size=4), 1)
    assert datasets.is_caching_enabled()


def test_a_corpus_without_owners_has_no_natural_partition():
    ownerless = Corpus("c", ["t"] * 100, np.arange(100) % 2, ("a", "b"))
    with pytest.raises(ConfigError, match="names the client"):
        deal(ownerless, DataSection(clients=4, partition=Partition(kind="natural", column="who")), 1)


def test_natural_partitions_keep_owners_together():
    shards = deal(
        corpus(), DataSection(clients=4, partition=Partition(kind="natural", column="who"), min_client_size=4), 1
    )
    for client in shards.train:
        positions = np.concatenate([shards.train[client], shards.local_test[client]])
        assert len({i % 4 for i in positions.tolist()}) == 1


def test_an_official_test_split_is_dealt_to_nobody():
    shards = deal(corpus(test=50), DataSection(clients=4, min_client_size=4), 1)
    assert shards.test.tolist() == list(range(250, 300))
    assert max(p.max() for p in [*shards.train.values(), *shards.local_test.values()]) < 250


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (DataSection(clients=301), "only 300 examples"),
        (DataSection(clients=4, min_client_size=80), "min_client_size = 80"),
        (DataSection(clients=3, partition=Partition(kind="natural", column="who")), "set data.clients = 4"),
        (DataSection(clients=4, test_fraction=0.001), "holds out no example"),
    ],
)
def test_impossible_deals_name_the_fix(data: DataSection, expected: str):
    with pytest.raises(ConfigError, match=expected):
        deal(corpus(), data, 1)


def test_description_counts_labels():
    shards = deal(corpus(), DataSection(clients=4, min_client_size=4), 1)
    found = json.loads(describe(shards, corpus()))
    for client, positions in shards.train.items():
        entry = found["clients"][client]
        assert entry["examples"] == len(entry["train"]) == sum(entry["labels"].values()) == len(positions)
