"""What the server of a run holds of its data: all of it in a simulation, in a deployment a public test file or nothing.

Everything on the server that would look at records asks here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from fedlab.config import RunConfig
from fedlab.config.data import DataSection
from fedlab.data import corpus_and_shards
from fedlab.data.collate import Tokens, tokenise
from fedlab.data.corpus import Corpus
from fedlab.data.federated import FederatedData
from fedlab.data.opening import labelled_corpus
from fedlab.data.partition import Shards, describe
from fedlab.models.loading import build
from fedlab.objectives import objective_class
from fedlab.run.data import record_data
from fedlab.run.deals import record_deals
from fedlab.run.deployment import Deployment
from fedlab.run.directory import RunDirectory
from fedlab.session import Session, open_session

logger = logging.getLogger("fedlab")


class ServerData(Protocol):
    """What the server holds."""

    @property
    def deployment(self) -> Deployment | None:
        """How the run is deployed; None in a simulation."""

    @property
    def clients(self) -> list[str]:
        """Clients that it plays; none in a deployment."""

    def record(self, directory: RunDirectory, say: Callable[[str], object]) -> None:
        """Write down what is read and who holds what, before the first round."""

    def open(self) -> Session:
        """Model and data of this process."""

    def held_out(self) -> tuple[Corpus, np.ndarray] | None:
        """What the model is scored on here, and where in its corpus; None where nothing is."""


@dataclass(frozen=True)
class SimulatedData:
    """Of a simulation: everybody's data."""

    config: RunConfig
    deployment: None = None

    @property
    def clients(self) -> list[str]:
        """Those of the partition."""
        return list(corpus_and_shards(self.config)[1].train)

    def record(self, directory: RunDirectory, say: Callable[[str], object]) -> None:
        """``data.json`` and ``partition.json``; raises PrivacyError where records would change hands."""
        for line in record_data(directory.path, self.config).lines():
            say(line)
        record_deals(self.config, directory.path)
        corpus, shards = corpus_and_shards(self.config)
        directory.write_text("partition.json", describe(shards, corpus), mode=0o600)

    def open(self) -> Session:
        """The process's session, which simulated clients in it share."""
        return open_session(self.config.to_toml())

    def held_out(self) -> tuple[Corpus, np.ndarray]:
        """The test split."""
        corpus, shards = corpus_and_shards(self.config)
        return corpus, shards.test


@dataclass(frozen=True)
class DeployedData:
    """Of a deployment: the server's own public test records, if it has any, and nothing of a client's."""

    config: RunConfig
    deployment: Deployment

    @property
    def clients(self) -> list[str]:
        """They say themselves who they are."""
        return []

    def record(self, directory: RunDirectory, say: Callable[[str], object]) -> None:
        """Say what the model will be scored on."""
        if (found := self._corpus) is None:
            say("the server has no test file ([test] of its own file): the global model is not scored here")
        else:
            say(f"the global model is scored on {len(found)} public texts of the server's own")

    def open(self) -> Session:
        """The model, and the test records as the data of a run without clients."""
        return self._session

    def held_out(self) -> tuple[Corpus, np.ndarray] | None:
        """All of the test file."""
        corpus = self._corpus
        return None if corpus is None else (corpus, np.arange(len(corpus)))

    @cached_property
    def _section(self) -> DataSection | None:
        return None if self.deployment.test is None else self.deployment.test.section(self.config.data.max_length)

    @cached_property
    def _corpus(self) -> Corpus | None:
        return None if self._section is None else labelled_corpus(self._section, self.config)

    @cached_property
    def _session(self) -> Session:
        config = self.config
        objective = objective_class(config.objective.name).of(config.objective, config.objective.labels, ())
        model, corpus = build(config, objective), self._corpus
        tokens = Tokens(np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64), None)
        if corpus is not None:
            tokens = tokenise(corpus, model.tokenizer, config.data.max_length, model.objective)
        return Session(config, model, FederatedData(tokens, Shards({}, {}, np.arange(len(tokens)))))


def server_data(config: RunConfig, directory: RunDirectory) -> ServerData:
    """What the server of the run in this directory holds."""
    deployment = Deployment.of(directory.path)
    return SimulatedData(config) if deployment is None else DeployedData(config, deployment)
