"""What every fedlab strategy shares: messages out, replies checked, one pure ``aggregate`` in between.

A strategy is a Flower message-API ``Strategy``. Its file holds its ``Options`` and ``aggregate``; the mathematics is in
``fedlab.lora``. Nothing that a client sends is trusted: names, shapes and values are checked, an unusable update is excluded and
named, and a client's weight is the size that it declared before the first round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pydantic
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from pydantic import ConfigDict

from fedlab.config import RunConfig
from fedlab.errors import FedlabError
from fedlab.lora.average import client_weights, weighted_mean
from fedlab.lora.state import State, check_update, from_wire, nbytes, select, to_wire
from fedlab.privacy.accounting import Event
from fedlab.seeds import client_order
from strategies.federation import Federation

logger = logging.getLogger("fedlab")


class NoOptions(pydantic.BaseModel):
    """Options of a strategy that has none; others derive from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass
class TrainOutcome:
    """What came back from one round of training."""

    updates: dict[str, State] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)  # client → why its update was not used
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # client → examples, steps, loss, clip_fraction, seconds
    busy: list[tuple[float, float]] = field(default_factory=list)  # (start, end) of each node's training, seconds since the epoch
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass
class EvaluateOutcome:
    """Accuracy of the global model on the clients' own held-out examples."""

    accuracy: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    busy: list[tuple[float, float]] = field(default_factory=list)


class LoraStrategy(Strategy):
    """Base of the strategies. Subclasses set ``trains`` and override ``aggregate``; ``Options`` are their own keys."""

    trains: ClassVar[frozenset[str]] = frozenset({"lora_A", "lora_B"})
    Options: ClassVar[type[NoOptions]] = NoOptions

    def __init__(self, config: RunConfig, federation: Federation) -> None:
        self.config, self.federation = config, federation
        self.options = self.Options(**config.strategy.options)
        self.train_outcome, self.evaluate_outcome = TrainOutcome(), EvaluateOutcome()
        self._sent: dict[int, list[str]] = {}  # node → cohort of the messages under way
        self._state: State = {}

    def aggregate(self, state: State, updates: dict[str, State], weights: dict[str, float], round_number: int) -> State:
        """New global state from the old one and the clients' changes. Pure: same arguments, same bits.

        ``updates[client]`` holds the change of every trained tensor; ``weights`` are positive and sum to 1.
        """
        mean = weighted_mean(updates, weights)
        return {name: value + mean[name] if name in mean else value for name, value in state.items()}

    def trained_names(self, state: State) -> list[str]:
        """Names of the tensors that clients train and send back."""
        parts = set(self.trains) | ({"head"} if self.config.train.head == "train" else set())
        return sorted(select(state, parts))

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message per node that hosts a client of this round."""
        self._state = from_record(arrays, "float32")
        trained = self.trained_names(self._state)
        cohorts = self.federation.cohorts(self.federation.draw(server_round))
        count = sum(map(len, cohorts.values()))
        self.train_outcome = TrainOutcome(bytes_down=count * nbytes(self._state, self.config.run.wire_dtype))
        return self._messages(MessageType.TRAIN, cohorts, {"round": server_round, "trained": trained})

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every reply, then aggregate. (None, None) if no update was usable; ``train_outcome`` says why."""
        outcome, trained = self.train_outcome, self.trained_names(self._state)
        for node, reply in self._by_node(replies, outcome.excluded).items():
            self._collect_train(node, reply, trained, outcome)
        if not outcome.updates:
            return None, None
        outcome.updates = dict(sorted(outcome.updates.items(), key=lambda item: client_order(item[0])))
        sizes = {client: self.federation.clients[client].examples for client in outcome.updates}
        weights = client_weights(sizes, self.config.strategy.weights)
        state = self.aggregate(self._state, outcome.updates, weights, server_round)
        return to_record(state, "float32"), MetricRecord({"clients": len(outcome.updates), "excluded": len(outcome.excluded)})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message per node: every client scores the global model on its own held-out examples."""
        self._state = from_record(arrays, "float32")
        self.evaluate_outcome = EvaluateOutcome()
        return self._messages(MessageType.EVALUATE, self.federation.cohorts(list(self.federation.clients)), {"round": server_round})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Collect the clients' accuracies into ``evaluate_outcome``."""
        outcome = self.evaluate_outcome
        for node, reply in self._by_node(replies, outcome.excluded).items():
            record = reply.content.metric_records["metrics"]
            clients = cast(list[str], reply.content.config_records["clients"]["ids"])
            outcome.busy.append((cast(float, record["started"]), cast(float, record["ended"])))
            for i, client in enumerate(clients):
                accuracy = cast(list[float], record["accuracy"])[i]
                if client in self._sent[node] and 0 <= accuracy <= 1:
                    outcome.accuracy[client] = accuracy
                    outcome.examples[client] = cast(list[int], record["examples"])[i]
        return None

    def summary(self) -> None:
        """Log the strategy and its options."""
        logger.info("%s: %s", type(self).__name__, self.options.model_dump())

    def _messages(self, kind: str, cohorts: dict[int, list[str]], values: dict[str, int | list[str]]) -> list[Message]:
        self._sent = cohorts
        state, config = to_record(self._state, self.config.run.wire_dtype), self.config.to_toml()
        messages = []
        for node, cohort in cohorts.items():
            record = ConfigRecord({"config": config, "clients": cohort, "wire_dtype": self.config.run.wire_dtype, **values})
            messages.append(Message(RecordDict({"state": state, "round": record}), node, kind))
        return messages

    def _by_node(self, replies: Iterable[Message], excluded: dict[str, str]) -> dict[int, Message]:
        """The one usable reply of each node that was asked; all clients of the other nodes are excluded, with the reason."""
        usable: dict[int, Message] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in self._sent or node in usable:
                continue  # nobody asked, or a duplicate: the first counts
            if reply.has_error():
                excluded.update(dict.fromkeys(self._sent[node], f"node failed: {_last_line(reply.error.reason)}"))
            else:
                usable[node] = reply
        for node, cohort in self._sent.items():
            if node not in usable:
                for client in cohort:
                    excluded.setdefault(client, f"no reply within {self.config.run.timeout:.0f} s")
        return usable

    def _collect_train(self, node: int, reply: Message, trained: list[str], outcome: TrainOutcome) -> None:
        """Take what is usable from one node's reply; whatever it lacks excludes the client concerned, never the round."""
        cohort = self._sent[node]
        try:
            content = reply.content
            for client, reason in zip(*(cast(list[str], content.config_records["failures"][k]) for k in ("ids", "reasons")), strict=True):
                if client in cohort:
                    outcome.excluded[client] = reason
            for client, event in _charges(content.config_records["charges"]).items():
                if client in cohort and event != self.federation.clients[client].event:
                    outcome.excluded[client] = f"charged {event}, which is not what it declared"
            metrics = content.metric_records["metrics"]
            outcome.busy.append((cast(float, metrics["started"]), cast(float, metrics["ended"])))
            ids = cast(list[str], content.config_records["clients"]["ids"])
            for i, client in enumerate(ids):
                if client in cohort:
                    columns_of = ("examples", "steps", "loss", "clip_fraction", "seconds")
                    outcome.metrics[client] = {k: cast(list[float], metrics[k])[i] for k in columns_of}
            received: dict[str, dict[str, Array]] = {client: {} for client in cohort}
            for key, array in content.array_records["updates"].items():
                client, _, name = key.partition("/")
                if client in received:
                    received[client][name] = array
        except (KeyError, IndexError, ValueError, TypeError, FedlabError) as error:
            for client in cohort:
                outcome.excluded.setdefault(client, f"malformed reply: {type(error).__name__}: {error}")
            return
        for client in cohort:
            if client in outcome.excluded:
                continue
            try:
                update = from_record(ArrayRecord(received[client]), self.config.run.wire_dtype)
                problem = check_update(update, self._state, trained)
            except Exception as error:  # an array that cannot even be decoded
                problem = f"undecodable: {type(error).__name__}: {error}"
            if problem is not None:
                outcome.excluded[client] = f"unusable update: {problem}"
            else:
                outcome.updates[client] = update
                outcome.bytes_up += nbytes(update, self.config.run.wire_dtype)


def _charges(record: ConfigRecord) -> dict[str, Event]:
    """client → the event that its node says it charged."""
    columns = (cast(list[Any], record[key]) for key in ("ids", "sampler", "q", "sigma", "steps"))
    return {client: Event(sampler, q, sigma, steps) for client, sampler, q, sigma, steps in zip(*columns, strict=True)}


def to_record(state: State, wire_dtype: str) -> ArrayRecord:
    """State → what Flower carries, in the wire dtype."""
    return ArrayRecord({name: Array(value) for name, value in to_wire(state, wire_dtype).items()})


def from_record(record: ArrayRecord, wire_dtype: str) -> State:
    """Inverse of ``to_record``; tensors are float32."""
    return from_wire({name: array.numpy() for name, array in record.items()}, wire_dtype)


def _last_line(reason: str | None) -> str:
    lines = [line for line in (reason or "").strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "unknown"
