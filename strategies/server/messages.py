"""The messages to the clients, and what is taken from their replies.

Nothing that a client sends is trusted: names, shapes and values are checked, an unusable update is excluded and named,
and a client's weight is the size that it declared before the first round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from flwr.app import Array, ConfigRecord, Message, MessageType, RecordDict

from fedlab.config import RunConfig
from fedlab.errors import FedlabError, PrivacyError
from fedlab.lora.ranks import narrow
from fedlab.lora.state import State, check_update, digest, from_wire, nbytes, to_wire
from fedlab.privacy.ledger.ledger import Entry
from fedlab.seeds import client_order
from strategies.base import Strategy
from strategies.server.federation import Federation
from strategies.server.heads import sent_names, trained_names
from strategies.server.outcome import UNUSABLE, EvaluateOutcome, TrainOutcome
from strategies.server.records import from_record, to_record

COLUMNS = ("examples", "steps", "loss", "clip_fraction", "seconds")  # per client, of a round of training


@dataclass(frozen=True)
class Request:
    """Messages under way: whom they ask, and what the replies are checked against."""

    messages: list[Message]
    cohorts: dict[int, list[str]]  # node → clients
    number: int = 0  # of the round
    state: State = field(default_factory=dict)  # that the clients start from
    ranks: dict[str, int] = field(default_factory=dict)  # client → rank of its adapter
    sent: list[str] = field(default_factory=list)  # names of the tensors that come back
    received: str = ""  # digest of the state as it arrives at the clients


class Messenger:
    """Makes the messages of a run and takes the replies.

    Args:
        config: the run's configuration.
        federation: who hosts whom, and the mirror of the clients' ledgers.
        strategy: says what travels, is trained and comes back.
    """

    def __init__(self, config: RunConfig, federation: Federation, strategy: Strategy) -> None:
        self.config, self.federation, self.strategy = config, federation, strategy

    def train(self, number: int, state: State, ranks: dict[str, int], drawn: list[str]) -> Request:
        """One message per node that hosts a client of this round."""
        dealt = self.federation.deal(self.federation.groups(drawn))
        cohorts = {node: [client for group in groups for client in group] for node, groups in dealt.items()}
        own: dict[int, dict[str, Any]] = {
            node: {"groups": [len(group) for group in groups], "ranks": [ranks[client] for client in cohorts[node]]}
            for node, groups in dealt.items()
        }
        values = {"round": number, "trained": trained_names(self.strategy, state, number)}
        wire = self.config.run.wire_dtype
        received = digest(from_wire(to_wire(self.strategy.travelling(state), wire), wire))
        messages = self._messages(MessageType.TRAIN, cohorts, state, values, own)
        sent = sent_names(self.strategy, state, number)
        return Request(messages, cohorts, number, state, ranks, sent, received)

    def collect_train(self, request: Request, replies: Iterable[Message]) -> TrainOutcome:
        """What is usable of the replies to ``train``; the outcome says why the rest is not."""
        wire = self.config.run.wire_dtype
        asked = [client for cohort in request.cohorts.values() for client in cohort]
        outcome = TrainOutcome(
            silent=set(asked), bytes_down=len(asked) * nbytes(self.strategy.travelling(request.state), wire)
        )
        for node, reply in self._by_node(request, replies, outcome.excluded).items():
            self._collect_train(request, node, reply, outcome)
        outcome.updates = dict(sorted(outcome.updates.items(), key=lambda item: client_order(item[0])))
        return outcome

    def evaluate(self, number: int, state: State) -> Request:
        """One message per node: every client scores the global model on its own held-out examples."""
        cohorts = self.federation.cohorts(list(self.federation.clients))
        return Request(self._messages(MessageType.EVALUATE, cohorts, state, {"round": number}), cohorts, number)

    def collect_evaluate(self, request: Request, replies: Iterable[Message]) -> EvaluateOutcome:
        """The clients' primary scores."""
        outcome = EvaluateOutcome()
        for node, reply in self._by_node(request, replies, outcome.excluded).items():
            record = reply.content.metric_records["metrics"]
            clients = cast(list[str], reply.content.config_records["clients"]["ids"])
            outcome.busy.append((cast(float, record["started"]), cast(float, record["ended"])))
            for i, client in enumerate(clients):
                score = cast(list[float], record["score"])[i]
                if client in request.cohorts[node] and math.isfinite(score):
                    outcome.scores[client] = score
                    outcome.examples[client] = cast(list[int], record["examples"])[i]
        return outcome

    def receipts(self, receipts: Mapping[str, Entry], clients: list[str]) -> Request:
        """One message per node: these clients' receipts, none for those without a commit.

        The replies carry their ledgers' new lines.
        """
        cohorts = self.federation.cohorts(clients)
        messages = []
        for node, cohort in cohorts.items():
            texts = [json.dumps(receipts[client]) if client in receipts else "" for client in cohort]
            content = RecordDict({"round": self._order(cohort, {"receipts": texts})})
            messages.append(Message(content, node, f"{MessageType.QUERY}.release"))
        return Request(messages, cohorts)

    def collect_lines(self, request: Request, replies: Iterable[Message]) -> dict[str, str]:
        """Take the ledger lines in the replies to ``receipts``; client → what is wrong with its ledger."""
        problems: dict[str, str] = {}
        for node, reply in self._by_node(request, replies, problems).items():
            try:
                record = reply.content.config_records
                self._take_lines(request.cohorts[node], record["charges"], problems)
                ids, reasons = (cast(list[str], record["failures"][key]) for key in ("ids", "reasons"))
                problems |= dict(zip(ids, reasons, strict=True))
            except (KeyError, TypeError, ValueError, FedlabError) as error:
                problems |= dict.fromkeys(request.cohorts[node], f"{type(error).__name__}: {error}")
        return problems

    def _take_lines(self, cohort: list[str], record: ConfigRecord, problems: dict[str, str]) -> set[str]:
        """Enter the ledger lines of one node's clients; returns whose were entered.

        A broken chain is a problem of its client alone.
        """
        mirror, entered = self.federation.mirror, set()
        for client, text in zip(cast(list[str], record["ids"]), cast(list[str], record["lines"]), strict=True):
            if client in cohort and mirror is not None:
                try:
                    mirror.accept(client, text)
                    entered.add(client)
                except FedlabError as error:
                    problems[client] = str(error)
        return entered

    def _order(self, cohort: list[str], values: Mapping[str, Any]) -> ConfigRecord:
        mirror = self.federation.mirror
        known = [mirror.known(client) if mirror else 0 for client in cohort]
        return self.federation.order.record(
            self.config, cohort, known=known, keep=sorted(self.strategy.personal), **values
        )

    def _messages(
        self,
        kind: str,
        cohorts: Mapping[int, list[str]],
        state: State,
        values: Mapping[str, Any],
        own: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> list[Message]:
        """The state and one order per node; ``own`` holds what only this node's order says."""
        wire = self.config.run.wire_dtype
        record, common = to_record(self.strategy.travelling(state), wire), {"wire_dtype": wire, **values}
        return [
            Message(
                RecordDict({"state": record, "round": self._order(cohort, common | dict((own or {}).get(node, {})))}),
                node,
                kind,
            )
            for node, cohort in cohorts.items()
        ]

    def _by_node(self, request: Request, replies: Iterable[Message], excluded: dict[str, str]) -> dict[int, Message]:
        """The one usable reply of each node that was asked; all clients of the other nodes are excluded, with the
        reason.
        """
        usable: dict[int, Message] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node not in request.cohorts or node in usable:
                continue  # nobody asked, or a duplicate: the first counts
            if reply.has_error():
                excluded.update(dict.fromkeys(request.cohorts[node], f"node failed: {_last_line(reply.error.reason)}"))
            else:
                usable[node] = reply
        for node, cohort in request.cohorts.items():
            if node not in usable:
                for client in cohort:
                    excluded.setdefault(client, f"no reply within {self.config.run.timeout:.0f} s")
        return usable

    def _collect_train(self, request: Request, node: int, reply: Message, outcome: TrainOutcome) -> None:
        """Take what is usable from one node's reply; what it lacks excludes the client concerned, never the round."""
        cohort = request.cohorts[node]
        try:
            received = self._read_train(cohort, reply.content, outcome)
        except (KeyError, IndexError, ValueError, TypeError, FedlabError) as error:
            for client in cohort:
                outcome.excluded.setdefault(client, f"malformed reply: {type(error).__name__}: {error}")
            return
        for client in cohort:
            if client not in outcome.excluded:
                self._take_update(request, client, received[client], outcome)

    def _read_train(self, cohort: list[str], content: RecordDict, outcome: TrainOutcome) -> dict[str, dict[str, Array]]:
        """Enter failures, ledgers and metrics of one node; returns each client's arrays, not yet decoded."""
        failures, charges = content.config_records["failures"], content.config_records["charges"]
        for client, reason in zip(cast(list[str], failures["ids"]), cast(list[str], failures["reasons"]), strict=True):
            if client in cohort:
                outcome.excluded[client] = reason
        outcome.silent -= self._take_lines(cohort, charges, outcome.excluded)
        for client in [*cast(list[str], failures["refused"]), *cast(list[str], charges["exhausted"])]:
            if client in cohort:
                self.federation.refused[client] = outcome.excluded.get(
                    client, "budget-exhausted: it cannot cover another round"
                )
        metrics = content.metric_records["metrics"]
        outcome.busy.append((cast(float, metrics["started"]), cast(float, metrics["ended"])))
        for i, client in enumerate(cast(list[str], content.config_records["clients"]["ids"])):
            if client in cohort:
                outcome.metrics[client] = {key: cast(list[float], metrics[key])[i] for key in COLUMNS}
        received: dict[str, dict[str, Array]] = {client: {} for client in cohort}
        for key, array in content.array_records["updates"].items():
            client, _, name = key.partition("/")
            if client in received:
                received[client][name] = array
        return received

    def _take_update(self, request: Request, client: str, arrays: dict[str, Array], outcome: TrainOutcome) -> None:
        """Decode and check one client's update; enter it, or why it cannot be used."""
        wire = self.config.run.wire_dtype
        try:
            update = from_record(arrays, wire)
            problem = check_update(update, narrow(request.state, request.ranks[client]), request.sent)
            if problem is None and self.federation.mirror is not None:
                outcome.commits[client] = self._witness(request, client, update)
        except PrivacyError as error:
            problem = str(error)
            outcome.unproven.add(client)
        except Exception as error:  # an array that cannot even be decoded
            problem = f"undecodable: {type(error).__name__}: {error}"
        if problem is not None:
            outcome.excluded[client] = f"{UNUSABLE}: {problem}"
        else:
            outcome.updates[client] = update
            outcome.bytes_up += nbytes(update, wire)

    def _witness(self, request: Request, client: str, update: State) -> Entry:
        """The signed line that commits this very update. Raises PrivacyError without one."""
        mirror, event = self.federation.mirror, self.federation.clients[client].event
        assert mirror is not None
        assert event is not None
        return mirror.witness(client, request.number, event, request.received, digest(update))


def _last_line(reason: str | None) -> str:
    lines = [line for line in (reason or "").strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "unknown"
