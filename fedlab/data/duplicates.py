"""Texts that are there more than once: within a client, at several clients, and held out though they are trained on.

Two texts (or pairs) are the same if they differ in white space alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlab.data.corpus import Corpus
from fedlab.data.partition import Shards
from fedlab.errors import ConfigError


@dataclass(frozen=True)
class Duplicates:
    """Examples whose text is somewhere else, too.

    Args:
        within: training examples whose text the same client has before.
        across: training examples whose text another client trains on.
        trained: held-out examples whose text is trained on.
        purged: of those, how many are left out of the scores.
    """

    within: int
    across: int
    trained: int
    purged: int = 0


def text_keys(corpus: Corpus) -> np.ndarray:
    """A number for each example's text [N] int64; equal texts have equal numbers."""
    numbers: dict[tuple[str, str], int] = {}
    pairs = corpus.pairs if corpus.pairs is not None else [""] * len(corpus)
    keys = ((" ".join(a.split()), " ".join(b.split())) for a, b in zip(corpus.texts, pairs, strict=True))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def text_digests(corpus: Corpus, positions: np.ndarray, salt: bytes) -> list[str]:
    """A salted hash of the text of each of these examples, 24 hexadecimal digits."""
    found = []
    for i in positions:
        pair = corpus.pairs[i] if corpus.pairs is not None else ""
        text = "\0".join(" ".join(part.split()) for part in (corpus.texts[i], pair))
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=salt, digest_size=12)
        found.append(digest.hexdigest())
    return found


def find_duplicates(corpus: Corpus, shards: Shards, purged: int = 0) -> Duplicates:
    """Count them; ``purged``: how many held-out ones are gone already."""
    keys = text_keys(corpus)
    mine = [keys[positions] for positions in shards.train.values()]
    holders = np.bincount(np.concatenate([np.unique(own) for own in mine]), minlength=int(keys.max(initial=0)) + 1)
    held_out = np.unique(np.concatenate([shards.test, *shards.local_test.values()]))
    return Duplicates(
        sum(len(own) - len(np.unique(own)) for own in mine),
        sum(int((holders[own] > 1).sum()) for own in mine),
        int((holders[keys[held_out]] > 0).sum()) + purged,
        purged,
    )


def purge(corpus: Corpus, tasks: Sequence[Shards]) -> tuple[Shards, ...]:
    """The shards of a run, or of every task, without held-out examples whose text is trained on in any of them.

    Raises ConfigError if no test example is left.
    """
    keys = text_keys(corpus)
    trained = np.unique(np.concatenate([keys[own] for shards in tasks for own in shards.train.values()]))

    def kept(positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions)[~np.isin(keys[positions], trained)]

    found = [
        replace(shards, local_test={c: kept(p) for c, p in shards.local_test.items()}, test=kept(shards.test))
        for shards in tasks
    ]
    if any(not len(shards.test) for shards in found):
        raise ConfigError(
            f'{corpus.name}: data.duplicates = "purge" leaves no test example, for all their texts are trained on; give'
            " another test split"
        )
    return tuple(found)
