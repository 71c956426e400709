"""What a run's model is worth: of the global model on the held-out test split, and per client on its own held-out part.

A score has a name; one of a run's scores is primary (``fedlab.evaluate``), and it is the one that clients are compared
by. Where clients keep a part of the model for themselves there is no global model to score, and each client is scored
with its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlab.config import RunConfig
from fedlab.evaluate import evaluate, higher_is_better, primary_name, primary_score, spread, worst_first
from fedlab.evaluate.public import drift, sample_answers
from fedlab.lora.state import State
from fedlab.models.plain import save_checked
from fedlab.run.directory import RunDirectory
from fedlab.run.metrics import MetricsLog
from fedlab.run.personal import load_personal
from fedlab.run.samples import SAMPLES, add_samples
from fedlab.session import Session, torch_threads


class Scoring:
    """Scores of a run as it goes on.

    Args:
        config: the run's configuration.
        session: model and data of the server's process.
        events: gets a line ``evaluate`` or ``evaluate_clients`` for each scoring.
        kept: the parts of the state that clients keep for themselves.
        personal: directory where simulated clients keep them.
    """

    def __init__(
        self, config: RunConfig, session: Session, events: MetricsLog, kept: frozenset[str], personal: Path
    ) -> None:
        self._config, self._session, self._events = config, session, events
        self._kept, self._personal = kept, personal
        self.scores: dict[str, float] | None = None  # of the global model; None before it was scored
        self.client_scores: dict[str, float] = {}  # client → primary score
        self._drift: dict[str, dict[str, float]] = {}  # "before" and "after" → scores of public text

    def score_model(self, number: int, state: State) -> float:
        """Score the global model on the held-out test split, with all cores. Returns the seconds it took.

        Does nothing where there is no global model, or nothing to score it on.
        """
        started = time.perf_counter()
        session = self._session
        if self._kept or not len(session.data.test):
            return 0.0
        with torch_threads(os.cpu_count() or 1):
            session.model.load(state)
            self.scores = evaluate(session.model, session.data, session.data.test, self._config)
        self._events.write("evaluate", number, examples=len(session.data.test), scores=self.scores)
        return time.perf_counter() - started

    def measure_public(self, when: str, number: int, state: State, directory: RunDirectory) -> None:
        """What the model makes of public texts "before" the first round or "after" the last, if that is asked for."""
        model, config = self._session.model, self._config
        if config.evaluate.drift is None and config.evaluate.prompts is None:
            return
        with torch_threads(os.cpu_count() or 1):
            model.load(state)
            if config.evaluate.drift is not None:
                self._drift[when] = drift(model, config)
                self._events.write("drift", number, when=when, scores=self._drift[when])
            if config.evaluate.prompts is not None:
                directory.write_json(SAMPLES, add_samples(directory.path, when, sample_answers(model, config)))

    def score_clients(self, number: int, state: State, clients: Iterable[str]) -> float:
        """Score simulated clients here, each on its held-out examples. Returns the seconds it took."""
        started = time.perf_counter()
        with torch_threads(os.cpu_count() or 1):
            self._session.model.load(state)
            self.take(number, {client: self._score_client(client, number, state) for client in clients})
        return time.perf_counter() - started

    def _score_client(self, client: str, number: int, state: State) -> float:
        """With the model that is loaded or, where it keeps a part, its own."""
        model, data = self._session.model, self._session.data
        if self._kept:
            model.load(state | load_personal(self._personal, client, number + 1))
        return primary_score(model, data, data.local_test(client), self._config)

    def take(self, number: int, scores: dict[str, float]) -> None:
        """Keep and log the clients' primary scores, whoever measured them."""
        self.client_scores = scores
        self._events.write(
            "evaluate_clients",
            number,
            primary=primary_name(self._config),
            client_scores=self._spread(),
            per_client=scores,
        )

    def save_personal_adapters(self, state: State, done: int, clients: Iterable[str]) -> None:
        """``personal/<client>/adapter`` of every simulated client that keeps a part of the model."""
        if not self._kept:
            return
        for client in clients:
            path = self._personal / client / "adapter"
            if (own := load_personal(self._personal, client, done + 1)) and not path.exists():
                save_checked(self._session.model, state | own, path, self._config)

    @property
    def worst_client(self) -> float | None:
        """The worst client's primary score; None where clients were not scored."""
        return self._spread()["worst"]

    def _spread(self) -> dict[str, float | None]:
        return spread(self.client_scores.values(), higher_is_better(self._config))

    def result(self) -> dict[str, Any]:
        """What ``result.json`` says of scores."""
        curve = worst_first(self.client_scores.values(), higher_is_better(self._config))
        found = {
            "scores": self.scores,
            "primary": primary_name(self._config),
            "client_scores": {**self._spread(), "curve": curve},
        }
        return found if self._config.evaluate.drift is None else {**found, "drift": self._drift}

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scores": self.scores, "client_scores": self.client_scores, "drift": self._drift}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what ``kept`` gave."""
        self.scores, self.client_scores = kept["scores"], kept["client_scores"]
        self._drift = dict(kept.get("drift", {}))
