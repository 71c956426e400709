"""Deal a corpus to clients with the partitioners of flwr-datasets, and hold out each client's test examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlab.config.sections import DataSection
from fedlab.data.corpus import Corpus
from fedlab.errors import ConfigError
from fedlab.seeds import random_stream, stream_seed


@dataclass(frozen=True)
class Shards:
    """Who holds what: positions in the corpus, sorted. Clients are in client order and share nothing."""

    train: dict[str, np.ndarray]
    local_test: dict[str, np.ndarray]
    test: np.ndarray  # the official test split, or the union of the local ones

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Flat arrays for the cache; ``sizes`` [2, clients] says how many positions are whose."""
        parts = [*self.train.values(), *self.local_test.values()]
        sizes = np.array([len(part) for part in parts], dtype=np.int64).reshape(2, -1)
        return {"positions": np.concatenate(parts).astype(np.int64), "sizes": sizes, "test": self.test}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Shards:
        """Inverse of ``to_arrays``."""
        clients = arrays["sizes"].shape[1]
        parts = np.split(np.asarray(arrays["positions"]), np.cumsum(arrays["sizes"].reshape(-1))[:-1])
        names = [f"client-{i}" for i in range(clients)]
        train, local_test = (dict(zip(names, half, strict=True)) for half in (parts[:clients], parts[clients:]))
        return cls(train, local_test, np.asarray(arrays["test"]))


def _dirichlet(data: DataSection, seed: int) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner

    assert data.partition.alpha is not None
    smallest = (
        data.min_client_size
    )  # what a client must be dealt, so that min_client_size are left to train on after the hold-out
    while smallest - _held_out(smallest, data) < data.min_client_size:
        smallest += 1
    return DirichletPartitioner(
        data.clients,
        partition_by="label",
        alpha=data.partition.alpha,
        min_partition_size=smallest,
        self_balancing=False,
        seed=seed,
    )


def _held_out(dealt: int, data: DataSection) -> int:
    return round(data.test_fraction * dealt)


def _other(name: str, *keys: str, seeded: bool = False, by_label: bool = False) -> Callable[[DataSection, int], Any]:
    """A partitioner of flwr-datasets by its class name; ``keys`` are passed on from data.partition."""
    renamed = {"classes_per_client": "num_classes_per_partition", "shards_per_client": "num_shards_per_partition"}

    def make(data: DataSection, seed: int) -> Any:
        from flwr_datasets import partitioner

        arguments: dict[str, Any] = {renamed[key]: getattr(data.partition, key) for key in keys}
        if by_label:
            arguments["partition_by"] = "label"
        if seeded:
            arguments["seed"] = seed
        return getattr(partitioner, name)(num_partitions=data.clients, **arguments)

    return make


def _natural(data: DataSection, seed: int) -> Any:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    return NaturalIdPartitioner(partition_by="natural")


PARTITIONERS: dict[str, Callable[[DataSection, int], Any]] = {
    "iid": _other("IidPartitioner"),
    "dirichlet": _dirichlet,
    "natural": _natural,
    "shard": _other("ShardPartitioner", "shards_per_client", seeded=True, by_label=True),
    "pathological": _other("PathologicalPartitioner", "classes_per_client", seeded=True, by_label=True),
    "linear": _other("LinearPartitioner"),
    "square": _other("SquarePartitioner"),
    "exponential": _other("ExponentialPartitioner"),
}
BY_LABEL = ("dirichlet", "shard", "pathological")  # kinds that look at labels


@contextmanager
def _no_fingerprints() -> Iterator[None]:
    """Keep ``datasets`` from pickling every list of positions to name a cache file that is never written: most of the
    time of a deal.
    """
    import datasets

    before = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if before:
            datasets.enable_caching()


def deal(corpus: Corpus, data: DataSection, seed: int) -> Shards:
    """Shuffle, deal, hold out.

    Deterministic in ``seed``; raises ConfigError that names a client that ends up too small.
    """
    import datasets

    trainable = len(corpus) - corpus.test
    if data.clients > trainable:
        raise ConfigError(
            f"data.clients = {data.clients}, but {corpus.name} has only {trainable} examples to deal; use fewer clients"
        )
    order = random_stream(seed, "deal").permutation(trainable)
    if data.partition.kind in BY_LABEL and not corpus.label_names:
        raise ConfigError(
            f"data.partition = {data.partition.kind} deals by label, but the labels of {corpus.name} have no names;"
            " use another kind"
        )
    columns: dict[str, Any] = {"position": order, "label": corpus.labels[order]}
    if data.partition.kind == "natural":
        if corpus.natural is None:
            raise ConfigError(
                f"data.partition = natural needs a column that names the client; {corpus.name} has none, use another"
                " kind"
            )
        columns["natural"] = [corpus.natural[i] for i in order]
        if (ids := len(set(columns["natural"]))) != data.clients:
            raise ConfigError(
                f"data.clients = {data.clients}, but column {data.partition.column!r} names {ids} clients; set"
                f" data.clients = {ids}"
            )
    partitioner = PARTITIONERS[data.partition.kind](data, stream_seed(seed, "partition") % 2**31)
    partitioner.dataset = datasets.Dataset.from_dict(columns)
    train: dict[str, np.ndarray] = {}
    local_test: dict[str, np.ndarray] = {}
    for i in range(data.clients):
        client = f"client-{i}"
        try:
            with _no_fingerprints():
                held = np.asarray(partitioner.load_partition(i).with_format("numpy")["position"][:], dtype=np.int64)
        except ValueError as error:
            raise ConfigError(
                f"data.partition = {data.partition.kind}: {str(error).splitlines()[0]}; use fewer clients or less skew"
            ) from None
        shuffled = np.sort(held)[random_stream(seed, "hold-out", client).permutation(len(held))]
        out = _held_out(len(held), data)
        train[client], local_test[client] = np.sort(shuffled[out:]), np.sort(shuffled[:out])
        if len(train[client]) < data.min_client_size:
            raise ConfigError(
                f"{client} would train on {len(train[client])} examples, fewer than data.min_client_size ="
                f" {data.min_client_size}; use fewer clients, less skew, or another run.seed"
            )
    test = np.arange(trainable, len(corpus)) if corpus.test else np.sort(np.concatenate(list(local_test.values())))
    if len(test) == 0:
        raise ConfigError(f"data.test_fraction = {data.test_fraction:g} holds out no example; use a larger one")
    return Shards(train, local_test, test)


def describe(shards: Shards, corpus: Corpus) -> str:
    """JSON of who holds what, with sizes and label counts per client: ``partition.json`` of a run."""
    clients = {}
    for client, positions in shards.train.items():
        names = corpus.label_names
        counts = np.bincount(corpus.labels[positions], minlength=len(names)) if names else ()
        clients[client] = {
            "examples": len(positions),
            "held_out": len(shards.local_test[client]),
            "labels": {name: int(count) for name, count in zip(names, counts, strict=True) if count},
            "train": positions.tolist(),
            "test": shards.local_test[client].tolist(),
        }
    return json.dumps(
        {
            "corpus": corpus.name,
            "examples": len(corpus),
            "labels": list(corpus.label_names),
            "test": len(shards.test),
            "clients": clients,
        }
    )
