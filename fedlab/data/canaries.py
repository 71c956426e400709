"""Canaries (Carlini et al., The Secret Sharer, arXiv 1802.08232): made-up secrets among the clients' training records.

The space R of possible secrets is a list of random digit strings, drawn from the data's seed; the secrets are some of
them, chosen evenly. Each is in a stated number of records of one client, beside the client's own records: nothing is
replaced. Like any other, such a record is one record: it is drawn, clipped, noised and charged as all are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedlab.config.data import Canaries
from fedlab.data.collate import Tokens
from fedlab.data.corpus import Corpus
from fedlab.data.partition import Shards
from fedlab.errors import ConfigError
from fedlab.seeds import random_stream

PROMPT, DIGITS = "The secret number is", 8


@dataclass(frozen=True)
class Secrets:
    """What was inserted, and what could have been.

    Args:
        records: the whole space R as records, in an order that says nothing of the secrets.
        chosen: positions in ``records`` of the secrets [m].
        clients: who holds each [m].
        copies: records that hold the same secret.
        first: position in the run's corpus from which on there are inserted records.
    """

    records: Corpus  # labels as the objective keeps them
    chosen: np.ndarray
    clients: tuple[str, ...]
    copies: int
    first: int


def with_canaries(
    corpus: Corpus, shards: Shards, settings: Canaries, objective: str, seed: int
) -> tuple[Corpus, Shards, Secrets]:
    """The corpus with inserted records at its end, the shards whose clients train on them, and what was inserted.

    Args:
        corpus: as it was assigned.
        shards: who holds what of it.
        settings: how many, and in how many records.
        objective: name of the objective that learns them.
        seed: of the space and of the choice.

    Raises:
        ConfigError: for an objective that does not learn text.
    """
    from fedlab.objectives import objective_class  # here: torch comes with it

    learnt, rng = objective_class(objective), random_stream(seed, "canaries")
    numbers = rng.choice(10**DIGITS, settings.space, replace=False)
    written = [learnt.secret_record(PROMPT, f"{number:0{DIGITS}d}") for number in numbers]
    texts, answers = [text for text, _ in written], [answer for _, answer in written]
    labels, names = learnt.encode_labels(answers, (), "data.canaries")
    assert not names
    pairs = None if corpus.pairs is None else [""] * len(texts)
    space = Corpus("canaries", texts, labels, (), pairs)
    chosen = rng.permutation(settings.space)[: settings.count]
    clients = tuple(shards.clients[i % len(shards.clients)] for i in range(settings.count))
    train = dict(shards.train)
    for i, client in enumerate(clients):
        own = len(corpus) + np.arange(i * settings.records, (i + 1) * settings.records)
        train[client] = np.concatenate([train[client], own])
    secrets = Secrets(space, chosen, clients, settings.records, len(corpus))
    owners = [shards.names.get(client, client) for client in clients]
    return _extended(corpus, space, chosen, owners, settings.records), replace(shards, train=train), secrets


def check_secrets(secrets: Secrets, space: Tokens, max_length: int) -> None:
    """Raise ConfigError where a model could not tell the secrets apart, or learns a part of each.

    ``space``: tokens of ``secrets.records``.
    """
    rows = np.arange(len(space))
    if max(int(space.lengths(rows).max()), int(space.label_lengths(rows).max())) >= max_length:
        raise ConfigError(f"data.max_length = {max_length} would cut the secrets of data.canaries; raise it")
    if len({space.label_bytes(rows[i : i + 1]) for i in rows}) < len(space):
        raise ConfigError(
            "data.canaries: this tokenizer writes different numbers with the same tokens, so nobody could tell secrets"
            " apart (it may not know digits); take another model, or remove data.canaries"
        )


def _extended(corpus: Corpus, space: Corpus, chosen: np.ndarray, owners: list[str], copies: int) -> Corpus:
    """The corpus with ``copies`` records of each secret at its end."""
    added = space.take(np.repeat(chosen, copies), 0)
    labels = np.concatenate([corpus.labels, added.labels])
    pairs = None if corpus.pairs is None else [*corpus.pairs, *(added.pairs or [])]
    natural = None if corpus.natural is None else [*corpus.natural, *np.repeat(owners, copies).tolist()]
    return replace(corpus, texts=[*corpus.texts, *added.texts], labels=labels, pairs=pairs, natural=natural)
