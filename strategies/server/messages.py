"""Requests to the clients, and what is taken from their replies.

Nothing that a client sends is believed: names, shapes and values are checked against what was asked, an unusable update
is excluded and named, and a client's weight is the size that it declared before the first round.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.serverapp import Grid

from fedlab.config import RunConfig
from fedlab.errors import PrivacyError
from fedlab.evaluate import primary_name
from fedlab.lora.ranks import narrow
from fedlab.lora.state import State, digest, from_wire, nbytes, to_wire
from fedlab.privacy.ledger.ledger import Entry
from fedlab.privacy.release import METRICS, NOISED_SCORES, SCORES, TIMING, UPDATE, event_of
from fedlab.privacy.scores_plan import SCORE
from fedlab.protocol import ProtocolError
from fedlab.protocol.checks import check_arrays, wire_bytes
from fedlab.protocol.failures import explained
from fedlab.protocol.messages import (
    ClientOrder,
    ClientReply,
    EvaluateReply,
    EvaluateRequest,
    ReceiptFor,
    ReceiptsReply,
    ReceiptsRequest,
    Release,
    TrainReply,
    TrainRequest,
)
from fedlab.seeds import client_order
from strategies.base import Strategy
from strategies.server.exchange import Answers, ask
from strategies.server.federation import Federation
from strategies.server.heads import sent_names, trained_names
from strategies.server.outcome import UNUSABLE, EvaluateOutcome, TrainOutcome

RECEIPT_SECONDS = 60.0  # to wait for clients that keep a receipt: nothing of the round depends on it
NO_BUDGET = "budget-exhausted: it cannot cover another round"


@dataclass(frozen=True)
class TrainingOrder:
    """A round's requests, and what the replies are checked against."""

    requests: dict[int, TrainRequest]  # by node
    shapes: dict[str, dict[str, tuple[int, ...]]]  # client → name → shape of what comes back
    number: int  # of the round
    received: str  # digest of the state as it arrives at the clients
    bytes_down: int

    def to(self, nodes: Collection[int]) -> TrainingOrder:
        """The same order to some of its nodes; what travels is counted anew."""
        requests = {node: request for node, request in self.requests.items() if node in nodes}
        clients = [entry.client for request in requests.values() for entry in request.clients]
        share = self.bytes_down * len(clients) // max(1, len(self.shapes))
        return replace(self, requests=requests, shapes={c: self.shapes[c] for c in clients}, bytes_down=share)


class Messenger:
    """Makes the requests of a run and takes the replies.

    Args:
        grid: Flower's.
        config: the run's configuration.
        federation: who hosts whom, and the mirror of the clients' ledgers.
        strategy: says what travels, is trained and comes back.
    """

    def __init__(self, grid: Grid, config: RunConfig, federation: Federation, strategy: Strategy) -> None:
        self.grid, self.config, self.federation, self.strategy = grid, config, federation, strategy

    def order_training(
        self, number: int, state: State, ranks: Mapping[str, int], drawn: Sequence[str]
    ) -> TrainingOrder:
        """One request per node that hosts a client of this round."""
        wire = self.config.run.wire_dtype
        travelling = self.strategy.travelling(state)
        arrays, trained = to_wire(travelling, wire), tuple(trained_names(self.strategy, state, number))
        requests = {}
        for node, passes in self.federation.assign(self.federation.groups(list(drawn))).items():
            requests[node] = TrainRequest(
                run=self.federation.run,
                round=number,
                clients=tuple(
                    ClientOrder(client, self.federation.known(client), ranks[client])
                    for group in passes
                    for client in group
                ),
                passes=tuple(len(group) for group in passes),
                trained=trained,
                personal=tuple(sorted(self.strategy.personal)),
                wire=wire,
                state=arrays,
            )
        sent = sent_names(self.strategy, state, number)
        shapes = {client: _shapes(narrow(state, ranks[client]), sent) for client in drawn}
        bytes_down = len(drawn) * nbytes(travelling, wire)
        return TrainingOrder(requests, shapes, number, digest(from_wire(arrays, wire)), bytes_down)

    def prepared(self, number: int, drawn: list[str]) -> list[str]:
        """Those of the clients drawn for a round that are ready to be asked."""
        return drawn

    def finish(self, number: int, outcome: TrainOutcome) -> None:
        """Do what is left to be done once all that came of a round is here."""

    def train(self, order: TrainingOrder, on_reply: Callable[[], object] = lambda: None) -> TrainOutcome:
        """What is usable of the replies; the outcome says why the rest is not."""
        cohorts = {node: [entry.client for entry in request.clients] for node, request in order.requests.items()}
        outcome = TrainOutcome(silent=set(order.shapes), bytes_down=order.bytes_down)
        most = {node: self._most(order, cohort) for node, cohort in cohorts.items()}
        answers = ask(self.grid, "train", order.requests, TrainReply, self.config.run.timeout, most, on_reply)
        self._take_all(order, cohorts, answers, outcome)
        for node, times in answers.asked.items():
            outcome.again.update(dict.fromkeys(cohorts[node], times - 1))
        outcome.busy = [(reply.started, reply.ended) for reply in answers.replies.values()]
        outcome.updates = dict(sorted(outcome.updates.items(), key=lambda item: client_order(item[0])))
        return outcome

    def evaluate(self, number: int, state: State) -> EvaluateOutcome:
        """Every client's scores of the global model on its own held-out examples."""
        wire, cohorts = self.config.run.wire_dtype, self._cohorts(self.federation.there)
        personal, arrays = tuple(sorted(self.strategy.personal)), to_wire(self.strategy.travelling(state), wire)
        requests = {
            node: EvaluateRequest(self.federation.run, number, tuple(cohort), personal, wire, arrays)
            for node, cohort in cohorts.items()
        }
        answers = ask(self.grid, "evaluate", requests, EvaluateReply, self.config.run.timeout)
        primary = primary_name(self.config)
        outcome = EvaluateOutcome(busy=[(reply.started, reply.ended) for reply in answers.replies.values()])
        for client, reply in self._by_client(cohorts, answers, outcome.excluded).items():
            if reply.failure is not None:
                outcome.excluded[client] = explained(reply.failure.code)
            elif (noised := reply.release(NOISED_SCORES)) is not None:
                outcome.scores |= _noised_score(client, noised, outcome.excluded)
            elif (scores := reply.release(SCORES)) is None:
                outcome.excluded[client] = "it sent no scores"
            elif primary in scores.numbers:  # not there for a client that holds nothing out
                outcome.scores[client] = scores.numbers[primary]
        return outcome

    def receipts(self, receipts: Mapping[str, Entry], clients: Sequence[str], closing: bool = False) -> dict[str, str]:
        """Let clients keep receipts, and take their ledgers' new lines; client → what is wrong with its ledger.

        ``closing``: the run is over, which each is to say in its ledger.
        """
        cohorts = self._cohorts(clients)
        requests = {
            node: ReceiptsRequest(
                self.federation.run,
                tuple(
                    ReceiptFor(c, self.federation.known(c), json.dumps(receipts[c]) if c in receipts else "")
                    for c in cohort
                ),
                closing,
            )
            for node, cohort in cohorts.items()
        }
        timeout = min(self.config.run.timeout, RECEIPT_SECONDS)
        problems: dict[str, str] = {}
        answers = ask(self.grid, "receipts", requests, ReceiptsReply, timeout)
        for client, reply in self._by_client(cohorts, answers, problems).items():
            if reply.failure is not None:
                problems[client] = explained(reply.failure.code)
            else:
                self.federation.take_lines(reply, problems)
        return problems

    def _most(self, order: TrainingOrder, cohort: Sequence[str]) -> int:
        """Bytes of arrays that a node's reply may hold."""
        return sum(wire_bytes(order.shapes[client], self.config.run.wire_dtype) for client in cohort)

    def _take_all(
        self,
        order: TrainingOrder,
        cohorts: Mapping[int, Sequence[str]],
        answers: Answers[TrainReply],
        outcome: TrainOutcome,
    ) -> None:
        """Enter what came of every node."""
        for client, reply in self._by_client(cohorts, answers, outcome.excluded).items():
            self._take(order, client, reply, outcome)

    def _cohorts(self, clients: Iterable[str]) -> dict[int, list[str]]:
        return self.federation.cohorts(self.federation.reachable(clients))

    def _by_client(
        self,
        cohorts: Mapping[int, Sequence[str]],
        answers: Answers[TrainReply] | Answers[EvaluateReply] | Answers[ReceiptsReply],
        excluded: dict[str, str],
    ) -> dict[str, ClientReply]:
        """Each asked client's one reply; who lacks one is excluded with the reason. What nobody asked for is left."""
        for node, reason in answers.failed.items():
            excluded |= dict.fromkeys(cohorts[node], reason)
        found: dict[str, ClientReply] = {}
        for node, reply in answers.replies.items():
            for mine in reply.clients:
                if mine.client in cohorts[node]:
                    found.setdefault(mine.client, mine)
            for client in cohorts[node]:
                if client not in found:
                    excluded[client] = "its node's reply does not name it"
        return found

    def hear(self, client: str, reply: ClientReply, outcome: TrainOutcome) -> bool:
        """Enter one client's ledger lines and its failure; whether it can have sent something."""
        if reply.failure is not None:
            outcome.excluded[client] = explained(reply.failure.code)
        if self.federation.take_lines(reply, outcome.excluded):
            outcome.silent.discard(client)
        if reply.exhausted or (reply.failure is not None and reply.failure.refused):
            self.federation.refused[client] = outcome.excluded.get(client, NO_BUDGET)
        return client not in outcome.excluded

    def _take(self, order: TrainingOrder, client: str, reply: ClientReply, outcome: TrainOutcome) -> None:
        """Enter what one client sent; what it lacks excludes it, never the round."""
        if not self.hear(client, reply, outcome):
            return
        try:
            update = self._update(order, client, reply)
            if self.federation.mirror is not None:
                outcome.commits[client] = self.witness(order, client, digest(update))
        except PrivacyError as error:
            outcome.unproven.add(client)
            outcome.excluded[client] = f"{UNUSABLE}: {error}"
        except ProtocolError as error:
            outcome.excluded[client] = f"{UNUSABLE}: {error.field}: {error.problem}"
        else:
            outcome.updates[client] = update
            outcome.metrics[client] = self.metrics(client, reply)
            outcome.bytes_up += nbytes(update, self.config.run.wire_dtype)

    def _update(self, order: TrainingOrder, client: str, reply: ClientReply) -> State:
        """The update in a reply. Raises ProtocolError unless it is what was asked for, and nothing else is there."""
        for release in reply.releases:
            if release.name not in (UPDATE, TIMING, METRICS):
                raise ProtocolError(release.name, "was not asked for", client)
            if release.name != UPDATE and release.arrays:
                raise ProtocolError(release.name, "holds arrays, which were not asked for", client)
        update = reply.release(UPDATE)
        if update is None:
            raise ProtocolError(UPDATE, "is missing", client)
        self.check_event(client, update)
        check_arrays(update, order.shapes[client], self.config.run.wire_dtype, client)
        return from_wire(update.arrays, self.config.run.wire_dtype)

    def check_event(self, client: str, release: Release) -> None:
        """Raise ProtocolError if a release says that it cost a client something else than it declared."""
        if release.event is not None and event_of(release.event) != self.federation.clients[client].event:
            raise ProtocolError("event", f"{release.event} is not what it declared", client)

    def metrics(self, client: str, reply: ClientReply) -> dict[str, float]:
        """Of a client's training; what it does not share is NaN."""
        shown: dict[str, float] = {}
        for name in (TIMING, METRICS):
            found = reply.release(name)
            shown |= found.numbers if found is not None else {}
        wanted = {name: shown.get(name, math.nan) for name in ("steps", "loss", "clip_fraction", "seconds")}
        return {"examples": self.federation.clients[client].examples, **wanted}

    def witness(self, order: TrainingOrder, client: str, sent: str | None) -> Entry:
        """The signed line that commits what has the digest ``sent``, or anything for None. Raises PrivacyError without
        one.
        """
        mirror, event = self.federation.mirror, self.federation.clients[client].event
        assert mirror is not None
        assert event is not None
        return mirror.witness(client, order.number, event, order.received, sent)


def _noised_score(client: str, release: Release, excluded: dict[str, str]) -> dict[str, float]:
    """The share in a charged release, between 0 and 1: cutting it off is post-processing."""
    try:
        check_arrays(release, {SCORE: (1,)}, "float32", client)
    except ProtocolError as error:
        excluded[client] = f"{UNUSABLE}: {error.field}: {error.problem}"
        return {}
    return {client: min(1.0, max(0.0, float(release.arrays[SCORE][0])))}


def _shapes(state: State, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(state[name].shape) for name in names}
