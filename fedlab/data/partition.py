"""Assign a corpus to clients and hold out each client's test examples.

Partitions by chance are those of flwr-datasets; a natural one follows the column that names each example's owner, and
its clients have their owners' names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlab.config.data import DEFAULT_CLIENTS, DataSection
from fedlab.data.corpus import Corpus
from fedlab.errors import ConfigError
from fedlab.identifiers import identifiers
from fedlab.seeds import client_order, random_stream, stream_seed


@dataclass(frozen=True)
class Shards:
    """Who holds what: positions in the corpus, sorted. Clients are in client order and share nothing."""

    train: dict[str, np.ndarray]
    local_test: dict[str, np.ndarray]
    test: np.ndarray  # the official test split, or the union of the local ones
    names: Mapping[str, str] = field(default_factory=dict)  # id → name as its owner wrote it, where they differ

    @property
    def clients(self) -> list[str]:
        """Client ids, in client order."""
        return list(self.train)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Flat arrays for the cache.

        Returns:
            ``positions`` of all clients' training and then held-out examples; ``sizes`` [2, clients], how many are
            whose; ``clients``, ids and names as JSON in UTF-8; and ``test``.
        """
        parts = [*self.train.values(), *self.local_test.values()]
        sizes = np.array([len(part) for part in parts], dtype=np.int64).reshape(2, -1)
        clients = json.dumps({client: self.names.get(client) for client in self.train}).encode()
        return {
            "positions": np.concatenate(parts).astype(np.int64),
            "sizes": sizes,
            "clients": np.frombuffer(clients, dtype=np.uint8),
            "test": self.test,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Shards:
        """Inverse of ``to_arrays``."""
        parts = np.split(np.asarray(arrays["positions"]), np.cumsum(arrays["sizes"].reshape(-1))[:-1])
        written: dict[str, str | None] = json.loads(arrays["clients"].tobytes())
        train, local_test = (
            dict(zip(written, half, strict=True)) for half in (parts[: len(written)], parts[len(written) :])
        )
        names = {client: name for client, name in written.items() if name is not None}
        return cls(train, local_test, np.asarray(arrays["test"]), names)


def assign(corpus: Corpus, data: DataSection, seed: int) -> Shards:
    """Give every example to one client, and hold out some of each client's. Deterministic in ``seed``.

    Raises:
        ConfigError: the corpus cannot be assigned like that; a client that ends up too small is named.
    """
    trainable = len(corpus) - corpus.test
    if trainable == 0:
        raise ConfigError(f"{corpus.name} has no examples to assign: all of them are the test split")
    if data.partition.kind == "natural":
        held, names = _by_owner(corpus, trainable, data)
    else:
        held, names = _by_chance(corpus, trainable, data, seed), {}
    return _shards(corpus, held, names, data, seed)


def assign_all(corpus: Corpus, data: DataSection, client: str, seed: int) -> Shards:
    """Give every example to the one client whose they are, and hold out some. Deterministic in ``seed`` and the name.

    Raises ConfigError where too few are left to train on.
    """
    return _shards(corpus, {client: np.arange(len(corpus) - corpus.test)}, {}, data, seed)


def _shards(
    corpus: Corpus, held: Mapping[str, np.ndarray], names: Mapping[str, str], data: DataSection, seed: int
) -> Shards:
    """Hold out some of what each client holds."""
    trainable = len(corpus) - corpus.test
    train: dict[str, np.ndarray] = {}
    local_test: dict[str, np.ndarray] = {}
    for client, positions in held.items():
        shuffled = np.sort(positions)[random_stream(seed, "hold-out", client).permutation(len(positions))]
        out = _held_out(len(positions), data)
        train[client], local_test[client] = np.sort(shuffled[out:]), np.sort(shuffled[:out])
        if len(train[client]) < data.min_client_size:
            raise ConfigError(
                f"{client} would train on {len(train[client])} examples, fewer than data.min_client_size ="
                f" {data.min_client_size}; use fewer clients, less skew, or another run.seed"
            )
    test = np.arange(trainable, len(corpus)) if corpus.test else np.sort(np.concatenate(list(local_test.values())))
    if len(test) == 0:
        raise ConfigError(f"data.test_fraction = {data.test_fraction:g} holds out no example; use a larger one")
    return Shards(train, local_test, test, names)


def describe(shards: Shards, corpus: Corpus) -> str:
    """JSON of who holds what, with sizes and label counts per client: ``partition.json`` of a run."""
    clients: dict[str, dict[str, Any]] = {}
    for client, positions in shards.train.items():
        names = corpus.label_names
        counts = corpus.label_counts(positions)
        clients[client] = {
            **({"name": shards.names[client]} if client in shards.names else {}),
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


def _by_owner(corpus: Corpus, trainable: int, data: DataSection) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Client id → positions, and id → name where they differ, from the column that names the owners."""
    column = data.partition.column
    if corpus.natural is None:
        raise ConfigError(
            f"data.partition = natural needs a column that names the client; {corpus.name} has none, use another kind"
        )
    owners = corpus.natural[:trainable]
    ids = identifiers(owners, f"column {column!r}")
    if data.clients not in (None, len(ids)):
        raise ConfigError(
            f"data.clients = {data.clients}, but column {column!r} names {len(ids)} clients; set data.clients ="
            f" {len(ids)}, or leave it out"
        )
    number = {name: i for i, name in enumerate(ids)}
    codes = np.array([number[owner] for owner in owners])
    grouped = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    held = dict(sorted(zip(ids.values(), grouped, strict=True), key=lambda item: client_order(item[0])))
    return held, {client: name for name, client in ids.items() if client != name}


def _by_chance(corpus: Corpus, trainable: int, data: DataSection, seed: int) -> dict[str, np.ndarray]:
    """Client id → positions, by a partitioner of flwr-datasets over the shuffled corpus."""
    import datasets

    count = data.clients or DEFAULT_CLIENTS
    if data.partition.kind in BY_LABEL and not corpus.label_names:
        raise ConfigError(
            f"data.partition = {data.partition.kind} assigns by label, but the labels of {corpus.name} have no names;"
            " use another kind"
        )
    if data.partition.kind in BY_LABEL and corpus.several:
        raise ConfigError(
            f"data.partition = {data.partition.kind} assigns by the one label of a text, but those of {corpus.name}"
            " have several; use another kind"
        )
    if count > trainable:
        raise ConfigError(
            f"data.clients = {count}, but {corpus.name} has only {trainable} examples to assign; use fewer clients"
        )
    order = random_stream(seed, "deal").permutation(trainable)
    partitioner = PARTITIONERS[data.partition.kind](data, count, stream_seed(seed, "partition") % 2**31)
    partitioner.dataset = datasets.Dataset.from_dict({"position": order, "label": corpus.labels[order]})
    held: dict[str, np.ndarray] = {}
    with _no_fingerprints():
        for i in range(count):
            try:
                part = partitioner.load_partition(i).with_format("numpy")
            except ValueError as error:
                raise ConfigError(
                    f"data.partition = {data.partition.kind}: {str(error).splitlines()[0]}; use fewer clients or less"
                    " skew"
                ) from None
            held[f"client-{i}"] = np.asarray(part["position"][:], dtype=np.int64)
    return held


def _held_out(examples: int, data: DataSection) -> int:
    """How many of a client's examples are held out."""
    return round(data.test_fraction * examples)


def _dirichlet(data: DataSection, count: int, seed: int) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner

    assert data.partition.alpha is not None
    smallest = data.min_client_size  # what a client needs, so that min_client_size are left after the hold-out
    while smallest - _held_out(smallest, data) < data.min_client_size:
        smallest += 1
    return DirichletPartitioner(
        count,
        partition_by="label",
        alpha=data.partition.alpha,
        min_partition_size=smallest,
        self_balancing=False,
        seed=seed,
    )


def _other(
    name: str, *keys: str, seeded: bool = False, by_label: bool = False
) -> Callable[[DataSection, int, int], Any]:
    """A partitioner of flwr-datasets by its class name; ``keys`` are passed on from data.partition."""
    renamed = {"classes_per_client": "num_classes_per_partition", "shards_per_client": "num_shards_per_partition"}

    def make(data: DataSection, count: int, seed: int) -> Any:
        from flwr_datasets import partitioner

        arguments: dict[str, Any] = {renamed[key]: getattr(data.partition, key) for key in keys}
        if by_label:
            arguments["partition_by"] = "label"
        if seeded:
            arguments["seed"] = seed
        return getattr(partitioner, name)(num_partitions=count, **arguments)

    return make


PARTITIONERS: dict[str, Callable[[DataSection, int, int], Any]] = {  # of clients by chance
    "iid": _other("IidPartitioner"),
    "dirichlet": _dirichlet,
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
    time of an assignment.
    """
    import datasets

    before = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if before:
            datasets.enable_caching()
