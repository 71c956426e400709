"""What every fedlab strategy shares: messages out, replies checked, one pure ``aggregate`` in between.

A strategy is a Flower message-API ``Strategy``. Its file holds its ``Options`` and ``aggregate``; the mathematics is in
``fedlab.lora``. Nothing that a client sends is trusted: names, shapes and values are checked, an unusable update is
excluded and named, and a client's weight is the size that it declared before the first round.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, FedlabError, PrivacyError, RunFailed
from fedlab.lora.average import client_weights, weighted_mean
from fedlab.lora.ranks import narrow, widen
from fedlab.lora.server_optimizer import Moments, server_step
from fedlab.lora.state import RESIDUAL, State, check_update, digest, from_wire, nbytes, part_of, select, to_wire
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.client_level import make_client_plan
from fedlab.privacy.ledger.ledger import Entry
from fedlab.privacy.noise import SecureNoise, SeededNoise
from fedlab.seeds import client_order, random_stream
from strategies.folding import require_float32
from strategies.heads import frozen_layers, keep_other_heads
from strategies.options import MeanOptions, NoOptions
from strategies.server.federation import Federation
from strategies.server.records import from_record, to_record

logger = logging.getLogger("fedlab")
UNUSABLE = "unusable update"  # what the reason of an exclusion begins with where a client sent what cannot be used


@dataclass
class TrainOutcome:
    """What came back from one round of training."""

    updates: dict[str, State] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)  # client → why its update was not used
    silent: set[str] = field(default_factory=set)  # clients whose ledger did not come back: they may have spent
    unproven: set[str] = field(default_factory=set)  # clients whose ledger does not show what they sent
    commits: dict[str, Entry] = field(default_factory=dict)  # client → the ledger line that commits its update
    metrics: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # client → examples, steps, loss, clip_fraction, seconds
    busy: list[tuple[float, float]] = field(
        default_factory=list
    )  # (start, end) of each node's training, seconds since the epoch
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
    effective: ClassVar[str] = (
        "product of means"  # what B·A (and the residual) become; tests/strategies/test_conformance.py holds it
    )
    folds: ClassVar[bool] = False  # the state carries a residual, which goes down with it
    linear: ClassVar[bool] = (
        True  # aggregate depends on the updates through their weighted mean alone: what client-level DP can noise
    )
    ranks: ClassVar[str] = "zero-padded changes"  # what clients of lower rank amount to; "" if all must have the same
    personal: ClassVar[frozenset[str]] = frozenset()  # parts that clients train and keep
    static: ClassVar[frozenset[str]] = (
        frozenset()
    )  # parts that stay as they are during a task of a stream: sent once, not per round
    Options: ClassVar[type[NoOptions]] = MeanOptions

    def __init__(self, config: RunConfig, federation: Federation) -> None:
        self.config, self.federation = config, federation
        self.check(config)
        self.client_plan = make_client_plan(config) if config.privacy.unit == "client" else None
        self.sent_digest = ""  # of the state as this round's clients received it
        self.options = self.Options(**config.strategy.options)
        self.moments = Moments()  # of the server's optimiser
        self.train_outcome, self.evaluate_outcome = TrainOutcome(), EvaluateOutcome()
        self._sent: dict[int, list[str]] = {}  # node → cohort of the messages under way
        self._state: State = {}

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError for settings that make no sense with this strategy, before anything is started."""
        if config.privacy.unit == "client" and not cls.linear:
            raise ConfigError(
                f'strategy.name = "{config.strategy.name}" needs each client\'s own factors, but under privacy.unit ='
                ' "client" the server noises one mean; use fedavg, ffa, fedsvd, rolora or head'
            )
        if config.clients.rank and not cls.ranks:
            raise ConfigError(
                f'clients.rank with strategy.name = "{config.strategy.name}": its rule needs equal ranks; use flexlora,'
                " hetlora or flora"
            )
        if config.tasks and cls.personal:
            raise ConfigError(
                f'strategy.name = "{config.strategy.name}" with [[tasks]]: clients keep'
                f" {', '.join(sorted(cls.personal))}, so there is no one model to score after a task; use fedavg"
            )
        if cls.folds:
            require_float32(config)
        if isinstance(options := cls.Options(**config.strategy.options), MeanOptions):
            options.check(config)

    def aggregate(self, state: State, updates: dict[str, State], weights: dict[str, float], round_number: int) -> State:
        """New global state from the old one and the clients' changes. Pure: same arguments, same bits.

        ``updates[client]`` holds the change of every trained tensor; ``weights`` are positive and sum to 1.
        """
        change = self.change(state, updates, weights)
        return {name: value + change[name] if name in change else value for name, value in state.items()}

    def change(self, state: State, updates: dict[str, State], weights: dict[str, float]) -> State:
        """The clients' mean change, in the state's shapes, after the robust rule and the server's optimiser if there
        are any.
        """
        full = {client: widen(update, state) for client, update in updates.items()}
        if not isinstance(self.options, MeanOptions):
            return weighted_mean(full, weights)
        try:
            exposed = sum(reason.startswith(UNUSABLE) for reason in self.train_outcome.excluded.values())
            mean = self.options.combine(full, weights, exposed)
        except ValueError as error:
            raise RunFailed(f"the clients' mean: {error}") from None
        if self.options.server is not None:
            mean, self.moments = server_step(self.options.server, mean, self.moments)
        return mean

    @property
    def memory(self) -> State:
        """What the server keeps between rounds beside the state, for a checkpoint; ``remember`` takes it back."""
        kept = {"first": self.moments.first, "second": self.moments.second}
        return {f"{kind}/{name}": value for kind, tensors in kept.items() for name, value in tensors.items()}

    def remember(self, memory: State) -> None:
        """Go on with what ``memory`` gave."""
        first, second = (
            {n.removeprefix(f"{kind}/"): v for n, v in memory.items() if n.startswith(f"{kind}/")}
            for kind in ("first", "second")
        )
        self.moments = Moments(first, second)

    @classmethod
    def begin_task(
        cls, config: RunConfig, state: State, memory: Mapping[str, Tensor], model: LoadedModel, task: int
    ) -> State:
        """The state that a task of a stream starts from; ``state`` is a fresh one, ``memory`` what the task before
        left.

        Default: go on.
        """
        return state | {name: value for name, value in memory.items() if name in state or part_of(name) in RESIDUAL}

    def end_task(self, state: State, memory: Mapping[str, Tensor], grams: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the next task needs to know.

        ``grams``: module → [n, n] of its inputs, for strategies in ``fedlab.config.tasks.READS_INPUTS``.
        """
        return dict(state)

    def trained_names(self, state: State, server_round: int = 1) -> list[str]:
        """Names of the tensors that clients train in a round.

        Of a head with several layers, those that all tasks share stay as the first task left them.
        """
        return sorted(select(state, self.trained_parts(self.config)).keys() - frozen_layers(self.config, state))

    def travelling(self, state: State) -> State:
        """What goes to the clients in every round."""
        return {name: value for name, value in state.items() if part_of(name) not in self.static}

    def sent_names(self, state: State, server_round: int = 1) -> list[str]:
        """Those of them that they send back."""
        return [name for name in self.trained_names(state, server_round) if part_of(name) not in self.personal]

    @classmethod
    def trained_parts(cls, config: RunConfig) -> list[str]:
        """``lora_A``, ``lora_B``, ``head``: the most that clients are ever asked to train; what a privacy plan's scope
        covers.
        """
        return sorted(cls.factors(config) | ({"head"} if config.train.head == "train" else set()))

    @classmethod
    def factors(cls, config: RunConfig) -> frozenset[str]:
        """Which factors are trained under this configuration."""
        return cls.trains

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per node that hosts a client of this round."""
        self._state = from_record(arrays, "float32")
        trained = self.trained_names(self._state, server_round)
        if server_round == 1 and self.config.private and {part_of(name) for name in trained} >= {"lora_A", "lora_B"}:
            name = self.config.strategy.name
            logger.warning(
                "%s trains A and B at once under DP: their product squares the noise; ffa or fedsvd train B alone", name
            )
        dealt = self.federation.deal(self.federation.groups(self.federation.draw(server_round)))
        cohorts = {node: [client for group in groups for client in group] for node, groups in dealt.items()}
        count = sum(map(len, cohorts.values()))
        wire = self.config.run.wire_dtype
        self.train_outcome = TrainOutcome(
            silent={c for cohort in cohorts.values() for c in cohort},
            bytes_down=count * nbytes(self.travelling(self._state), wire),
        )
        self.sent_digest = digest(from_wire(to_wire(self.travelling(self._state), wire), wire))
        passes = {node: {"groups": [len(group) for group in groups]} for node, groups in dealt.items()}
        return self._messages(MessageType.TRAIN, cohorts, {"round": server_round, "trained": trained}, passes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every reply, then aggregate. (None, None) if no update was usable; ``train_outcome`` says why."""
        outcome, trained = self.train_outcome, self.sent_names(self._state, server_round)
        for node, reply in self._by_node(replies, outcome.excluded).items():
            self._collect_train(server_round, node, reply, trained, outcome)
        outcome.updates = dict(sorted(outcome.updates.items(), key=lambda item: client_order(item[0])))
        if self.client_plan is not None:
            return self._aggregate_privately(server_round, trained), None
        if not outcome.updates:
            return None, None
        sizes = {client: self.federation.clients[client].examples for client in outcome.updates}
        weights = client_weights(sizes, self.config.strategy.weights)
        state = keep_other_heads(
            self.config, self._state, self.aggregate(self._state, outcome.updates, weights, server_round)
        )
        return to_record(state, "float32"), MetricRecord(
            {"clients": len(outcome.updates), "excluded": len(outcome.excluded)}
        )

    def _aggregate_privately(self, server_round: int, trained: list[str]) -> ArrayRecord:
        """Client-level DP: one noised mean of the clipped updates takes the place of the clients' own (post-processing
        from there on).
        """
        plan = self.client_plan
        assert plan is not None
        seeded = SeededNoise(random_stream(self.config.sampling_seed, "noise", "server", server_round))
        noise = seeded if plan.noise == "seeded" else SecureNoise()
        updates = {client: widen(update, self._state) for client, update in self.train_outcome.updates.items()}
        mean = plan.mean(updates, {name: self._state[name] for name in trained}, noise)
        state = self.aggregate(self._state, {"everyone": mean}, {"everyone": 1.0}, server_round)
        return to_record(keep_other_heads(self.config, self._state, state), "float32")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per node: every client scores the global model on its own held-out examples."""
        self._state = from_record(arrays, "float32")
        self.evaluate_outcome = EvaluateOutcome()
        return self._messages(
            MessageType.EVALUATE, self.federation.cohorts(list(self.federation.clients)), {"round": server_round}
        )

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

    def release_messages(self, receipts: Mapping[str, Entry], clients: list[str]) -> list[Message]:
        """One message per node: these clients' receipts (none for those without a commit); the replies carry their
        ledgers' new lines.
        """
        self._sent = self.federation.cohorts(clients)
        return [
            Message(
                RecordDict(
                    {
                        "round": self._order(
                            cohort, {"receipts": [json.dumps(receipts[c]) if c in receipts else "" for c in cohort]}
                        )
                    }
                ),
                node,
                f"{MessageType.QUERY}.release",
            )
            for node, cohort in self._sent.items()
        ]

    def collect_lines(self, replies: Iterable[Message]) -> dict[str, str]:
        """Take the ledger lines in the replies to ``release_messages``; client → what is wrong with its ledger."""
        problems: dict[str, str] = {}
        for node, reply in self._by_node(replies, problems).items():
            try:
                record = reply.content.config_records
                self._take_lines(node, record["charges"], problems)
                problems |= dict(
                    zip(
                        cast(list[str], record["failures"]["ids"]),
                        cast(list[str], record["failures"]["reasons"]),
                        strict=True,
                    )
                )
            except (KeyError, TypeError, ValueError, FedlabError) as error:
                problems |= dict.fromkeys(self._sent[node], f"{type(error).__name__}: {error}")
        return problems

    def _take_lines(self, node: int, record: ConfigRecord, problems: dict[str, str]) -> set[str]:
        """Enter the ledger lines of one node's clients; returns whose were entered.

        A broken chain is a problem of its client alone.
        """
        mirror, entered = self.federation.mirror, set()
        for client, text in zip(cast(list[str], record["ids"]), cast(list[str], record["lines"]), strict=True):
            if client in self._sent[node] and mirror is not None:
                try:
                    mirror.accept(client, text)
                    entered.add(client)
                except FedlabError as error:
                    problems[client] = str(error)
        return entered

    def _order(self, cohort: list[str], values: dict[str, Any]) -> ConfigRecord:
        mirror = self.federation.mirror
        known = [mirror.known(client) if mirror else 0 for client in cohort]
        ranks = [self.federation.ranks[client] for client in cohort]
        return self.federation.order.record(
            self.config, cohort, known=known, ranks=ranks, keep=sorted(self.personal), **values
        )

    def _messages(
        self,
        kind: str,
        cohorts: dict[int, list[str]],
        values: dict[str, int | list[str]],
        own: Mapping[int, Mapping[str, list[int]]] | None = None,
    ) -> list[Message]:
        self._sent = cohorts
        wire = self.config.run.wire_dtype
        state, common = to_record(self.travelling(self._state), wire), {"wire_dtype": wire, **values}
        return [
            Message(
                RecordDict({"state": state, "round": self._order(cohort, common | dict((own or {}).get(node, {})))}),
                node,
                kind,
            )
            for node, cohort in cohorts.items()
        ]

    def _by_node(self, replies: Iterable[Message], excluded: dict[str, str]) -> dict[int, Message]:
        """The one usable reply of each node that was asked; all clients of the other nodes are excluded, with the
        reason.
        """
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

    def _collect_train(
        self, server_round: int, node: int, reply: Message, trained: list[str], outcome: TrainOutcome
    ) -> None:
        """Take what is usable from one node's reply; whatever it lacks excludes the client concerned,
        never the round.
        """
        cohort = self._sent[node]
        try:
            content = reply.content
            failures = content.config_records["failures"]
            for client, reason in zip(
                cast(list[str], failures["ids"]), cast(list[str], failures["reasons"]), strict=True
            ):
                if client in cohort:
                    outcome.excluded[client] = reason
            charges = content.config_records["charges"]
            outcome.silent -= self._take_lines(node, charges, outcome.excluded)
            for client in [*cast(list[str], failures["refused"]), *cast(list[str], charges["exhausted"])]:
                if client in cohort:
                    self.federation.refused[client] = outcome.excluded.get(
                        client, "budget-exhausted: it cannot cover another round"
                    )
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
                update = from_record(received[client], self.config.run.wire_dtype)
                problem = check_update(update, narrow(self._state, self.federation.ranks[client]), trained)
                if problem is None and self.federation.mirror is not None:
                    outcome.commits[client] = self._witness(server_round, client, update)
            except PrivacyError as error:
                problem = str(error)
                outcome.unproven.add(client)
            except Exception as error:  # an array that cannot even be decoded
                problem = f"undecodable: {type(error).__name__}: {error}"
            if problem is not None:
                outcome.excluded[client] = f"{UNUSABLE}: {problem}"
            else:
                outcome.updates[client] = update
                outcome.bytes_up += nbytes(update, self.config.run.wire_dtype)

    def _witness(self, server_round: int, client: str, update: State) -> Entry:
        """The signed line that commits this very update. Raises PrivacyError without one."""
        mirror, event = self.federation.mirror, self.federation.clients[client].event
        assert mirror is not None
        assert event is not None
        return mirror.witness(client, server_round, event, self.sent_digest, digest(update))


def _last_line(reason: str | None) -> str:
    lines = [line for line in (reason or "").strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "unknown"
