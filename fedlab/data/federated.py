"""The data of a run as training and evaluation read them: tokens of the corpus, and who holds which."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from fedlab.data.collate import Tokens
from fedlab.data.hidden_states import HiddenStates
from fedlab.data.partition import Shards
from fedlab.data.tasks import TaskData

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FederatedData:
    """Tokens of the corpus and who holds which; all positions refer to the corpus."""

    tokens: Tokens
    shards: Shards
    hidden_states: HiddenStates | None = None  # below the lowest adapter
    tasks: TaskData | None = None  # of a stream
    _fingerprints: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def clients(self) -> list[str]:
        """Client ids, in client order."""
        return self.shards.clients

    @property
    def test(self) -> np.ndarray:
        """Positions of the central test split."""
        return self.shards.test

    def train(self, client: str) -> np.ndarray:
        """Positions of a client's training examples."""
        return self.shards.train[client]

    def local_test(self, client: str) -> np.ndarray:
        """Positions of a client's held-out examples."""
        return self.shards.local_test[client]

    def batch(self, indices: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        """A padded batch of these examples for an objective."""
        batch = self.tokens.batch(indices, pad_id)
        if self.hidden_states is not None:
            batch["hidden"] = self.hidden_states.batch(indices, self.tokens.lengths(indices))
        return batch

    def at(self, task: int) -> FederatedData:
        """The same texts as one task of the stream assigns them, for evaluation."""
        if self.tasks is None:
            raise ValueError("these data are no stream: there is one task only")
        return replace(self, shards=self.tasks.shards[task], _fingerprints={})

    def size(self, client: str) -> int:
        """Number of a client's training examples."""
        return len(self.shards.train[client])

    def fingerprint(self, client: str) -> str:
        """SHA-256 of a client's training examples.

        Tells whoever can guess the text, so it leaves only under a keyed hash.
        """
        if client not in self._fingerprints:
            result = hashlib.sha256()
            for index in self.train(client):
                start, stop = self.tokens.offsets[index], self.tokens.offsets[index + 1]
                result.update(self.tokens.ids[start:stop].tobytes() + b"|")
            result.update(self.tokens.label_bytes(self.train(client)))
            self._fingerprints[client] = result.hexdigest()
        return self._fingerprints[client]
