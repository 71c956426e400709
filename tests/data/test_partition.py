"""Assignment: every example has one owner, the same seed gives the same, and nobody is left too small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlab.config import RunConfig
from fedlab.config.sections import DataSection, Partition
from fedlab.data import corpus_and_shards
from fedlab.data.corpus import Corpus
from fedlab.data.partition import Shards, assign, describe
from fedlab.errors import ConfigError
from fedlab.identifiers import is_identifier


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
    shards, again = assign(corpus(), data, 1), assign(corpus(), data, 1)
    everything = np.concatenate([*shards.train.values(), *shards.local_test.values()])
    assert len(set(everything.tolist())) == len(everything)
    if partition.kind == "pathological":  # leaves the classes that nobody drew to nobody; the others are whole
        assert set(np.bincount(everything % 5, minlength=5).tolist()) <= {0, 60}
        assert all(len(set((p % 5).tolist())) <= 2 for p in shards.train.values())
        assert len(everything) >= 120
    else:
        assert len(everything) >= 300 - (7 if partition.kind == "shard" else 0)  # the remainder of 300 over 8 shards
    assert shards.clients == [f"{'s' if partition.kind == 'natural' else 'client-'}{i}" for i in range(4)]
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
    assert (restored.clients, restored.names) == (shards.clients, shards.names)


def test_another_seed_assigns_differently():
    data = DataSection(clients=4, min_client_size=4)
    assert not np.array_equal(assign(corpus(), data, 1).train["client-0"], assign(corpus(), data, 2).train["client-0"])


def test_dirichlet_is_skewed_and_iid_is_not():
    def skew(partition: Partition) -> float:
        shards = assign(corpus(3000), DataSection(clients=4, partition=partition), 1)
        shares = [np.bincount(np.arange(3000)[p] % 5, minlength=5) / len(p) for p in shards.train.values()]
        return float(np.std(shares))

    assert skew(Partition(kind="dirichlet", alpha=0.1)) > 5 * skew(Partition(kind="iid"))


def test_dirichlet_leaves_enough_to_train_on_after_the_hold_out():
    data = DataSection(
        clients=4, partition=Partition(kind="dirichlet", alpha=0.3), min_client_size=30, test_fraction=0.2
    )
    for seed in range(12):  # with 30 instead of 37 at least, a quarter of the seeds are refused
        assert min(len(p) for p in assign(corpus(), data, seed).train.values()) >= 30


def test_assigning_leaves_the_caching_of_datasets_as_it_was():
    import datasets

    assert datasets.is_caching_enabled()
    assign(corpus(), DataSection(clients=4, min_client_size=4), 1)
    assert datasets.is_caching_enabled()


def test_a_corpus_without_owners_has_no_natural_partition():
    ownerless = Corpus("c", ["t"] * 100, np.arange(100) % 2, ("a", "b"))
    with pytest.raises(ConfigError, match="names the client"):
        assign(ownerless, DataSection(clients=4, partition=Partition(kind="natural", column="who")), 1)


def owned(*owners: str) -> Corpus:
    """240 examples that belong to these owners in turn."""
    return replace(corpus(240), natural=[owners[i % len(owners)] for i in range(240)])


NATURAL = DataSection(partition=Partition(kind="natural", column="who"), min_client_size=4)


def test_natural_partitions_keep_owners_together_under_their_names():
    shards = assign(corpus(), NATURAL, 1)  # as many clients as there are names
    for k, client in enumerate(["s0", "s1", "s2", "s3"]):
        positions = np.concatenate([shards.train[client], shards.local_test[client]])
        assert sorted(positions.tolist()) == list(range(k, 300, 4))
    assert shards.names == {}


def test_names_are_as_written_safe_for_files_and_kept_where_they_differ():
    written = ["10", "9", "01", "St. Mary's", "server", "../x"]
    shards = assign(owned(*written), NATURAL, 1)
    assert shards.clients[:3] == ["9", "01", "10"], "client order: shorter first, then by text"
    assert {shards.names.get(client, client) for client in shards.clients} == set(written)
    assert all(is_identifier(client) for client in shards.clients)
    assert Shards.from_arrays(shards.to_arrays()).names == shards.names
    described = json.loads(describe(shards, owned(*written)))["clients"]
    assert {entry.get("name", client) for client, entry in described.items()} == set(written)
    assert "name" not in described["01"]


def test_owners_that_differ_only_in_case_are_refused():
    with pytest.raises(ConfigError, match="column 'who' has both 'hospa' and 'HospA'"):
        assign(owned("hospa", "HospA"), NATURAL, 1)


def test_the_cache_on_disk_knows_names_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def shards(path: Path, seed: int, **settings: object) -> Shards:
        data = {"source": "files", "path": str(path), "text": "text", "label": "y", "min_client_size": 4, **settings}
        tree = {"run": {"rounds": 1, "seed": seed}, "lora": {"rank": 1, "alpha": 1}, "train": {"lr": 1, "steps": 1}}
        return corpus_and_shards(RunConfig.model_validate({**tree, "data": data}))[1]

    def write(name: str, owners: str) -> Path:
        rows = [{"text": f"t{i}", "y": f"l{i % 2}", "who": f"{owners}{i % 3}"} for i in range(120)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    monkeypatch.setenv("FEDLAB_CACHE", str(tmp_path / "cache"))
    a, b = write("a.jsonl", "north"), write("b.jsonl", "south")
    partition = {"kind": "natural", "column": "who"}
    assert shards(a, 1, partition=partition).clients == ["north0", "north1", "north2"]
    assert shards(a, 1, partition=partition).clients == ["north0", "north1", "north2"], "from the cache"
    assert shards(b, 1, partition=partition).clients == ["south0", "south1", "south2"]
    one, other, again = (shards(a, seed).train["client-0"] for seed in (1, 2, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_an_official_test_split_is_nobodys():
    shards = assign(corpus(test=50), DataSection(clients=4, min_client_size=4), 1)
    assert shards.test.tolist() == list(range(250, 300))
    assert max(p.max() for p in [*shards.train.values(), *shards.local_test.values()]) < 250


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (DataSection(clients=301), "only 300 examples"),
        (DataSection(clients=4, min_client_size=80), "min_client_size = 80"),
        (DataSection(clients=3, partition=Partition(kind="natural", column="who")), "set data.clients = 4, or leave"),
        (DataSection(clients=4, test_fraction=0.001), "holds out no example"),
    ],
)
def test_impossible_assignments_name_the_fix(data: DataSection, expected: str):
    with pytest.raises(ConfigError, match=expected):
        assign(corpus(), data, 1)


def test_description_counts_labels():
    shards = assign(corpus(), DataSection(clients=4, min_client_size=4), 1)
    found = json.loads(describe(shards, corpus()))
    for client, positions in shards.train.items():
        entry = found["clients"][client]
        assert entry["examples"] == len(entry["train"]) == sum(entry["labels"].values()) == len(positions)
