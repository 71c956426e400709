"""The round loop: configure → train → aggregate → evaluate, with everything that Flower's ``Strategy.start()`` lacks.

It resumes from a checkpoint, ends early when nobody may take part any more, survives clients that fail, and measures
itself.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.data import corpus_and_shards
from fedlab.errors import RunFailed
from fedlab.evaluate.classification import Scores, classify
from fedlab.lora.state import State, digest, nbytes, part_of
from fedlab.models.adapters import save_adapter
from fedlab.privacy.ledger.ledger import Entry
from fedlab.run.checkpoint import load_checkpoint, save_checkpoint
from fedlab.run.directory import RunDirectory
from fedlab.run.metrics import MetricsLog
from fedlab.run.personal import load_personal
from fedlab.run.progress import Progress, RoundLine
from fedlab.seeds import client_order
from fedlab.session import open_session, torch_threads
from fedlab.train.memory import plan_memory
from strategies import STRATEGIES
from strategies.base import LoraStrategy, TrainOutcome
from strategies.server.accounts import NO_DP, Accounts
from strategies.server.exchange import exchange
from strategies.server.federation import Federation, RunOrder
from strategies.server.records import from_record, to_record
from strategies.server.task_boundary import first_state

logger = logging.getLogger("fedlab")
RECEIPT_SECONDS = 60.0  # to wait for clients that keep a receipt: nothing of the round depends on it


class Rounds:
    """State of one run on the server: adapter, strategy, what was spent, totals."""

    def __init__(
        self, grid: Grid, config: RunConfig, directory: RunDirectory, events: MetricsLog, progress: Progress
    ) -> None:
        self.grid, self.config = grid, config
        self.directory, self.events, self.progress = directory, events, progress
        self.basis_bytes = 0
        self.state: State = {}
        self.memory: dict[str, Tensor] = {}  # what the task before left, in a stream
        strategy = STRATEGIES[config.strategy.name]
        self.accounts = Accounts(config, directory)
        self.personal = directory.path / "personal"  # of simulated clients
        order = RunOrder(
            directory.run_id, str(self.accounts.ledgers), strategy.trained_parts(config), str(self.personal)
        )
        self.federation = self._discover(order, strategy)
        self.strategy = strategy(config, self.federation)
        self.accounts.begin(
            self.federation, {name: tuple(self.state[name].shape) for name in self.strategy.trained_names(self.state)}
        )
        self.done, self.adapter_moved = 0, False
        self.scores: Scores | None = None
        self.client_accuracy: dict[str, float] = {}
        self.totals = {
            "bytes_up": 0,
            "bytes_down": self.basis_bytes,
            "excluded": 0,
            "round_seconds": 0.0,
            "overhead_seconds": 0.0,
        }
        self._restore()
        self._plan_memory()

    def _discover(self, order: RunOrder, strategy: type[LoraStrategy]) -> Federation:
        """Find the clients, open the session and make the first state.

        Nodes load their model while the server loads its own.
        """
        config, mirror = self.config, self.accounts.mirror
        clients = corpus_and_shards(config)[1].clients
        if not strategy.static:
            federation = Federation.discover(
                self.grid, config, order, mirror, clients, meanwhile=lambda: open_session(config.to_toml())
            )
            self.session = open_session(config.to_toml())
            self.state, self.memory = first_state(config, strategy, self.session)
            return federation
        self.session = open_session(config.to_toml())  # first, because the clients are told what stays as it is
        self.state, self.memory = first_state(config, strategy, self.session)
        basis = {name: value for name, value in self.state.items() if part_of(name) in strategy.static}
        self.session = replace(self.session, basis=basis)
        order = replace(order, basis=digest(basis), bases=str(self.directory.path / "bases"))
        federation = Federation.discover(self.grid, config, order, mirror, clients, basis=to_record(basis, "float32"))
        widest = max(len(value) for name, value in self.state.items() if name.endswith(".lora_A"))
        federation.ranks = dict.fromkeys(federation.ranks, widest)
        self.basis_bytes = len(federation.clients) * nbytes(basis)
        return federation

    def _plan_memory(self) -> None:
        """How many clients may share a pass.

        Said once and kept with the run, because it decides how sums are rounded.
        """
        if self.federation.hosts or self.config.train.gradients != "fused":
            return
        asked = self.federation.max_clients_per_pass or min(self.config.cohort_size, self.config.clients_per_round)
        plan = plan_memory(self.session, self.state, self.strategy.trained_names(self.state), asked)
        self.federation.max_clients_per_pass = self.federation.max_clients_per_pass or plan.clients
        logger.info("%s", plan)
        self.progress.remark(str(plan))

    def run(self) -> str:
        """Run the remaining rounds. Returns the status, ``completed`` or ``budget-exhausted``; raises RunFailed."""
        self.strategy.summary()
        if self.done == 0:
            self._evaluate_server(0)
        for round_number in range(self.done + 1, self.config.run.rounds + 1):
            if not self._round(round_number):
                return "budget-exhausted"
        return "completed"

    def _round(self, number: int) -> bool:
        """One round; False if too few clients may still take part."""
        started = time.perf_counter()
        if len(self.federation.eligible) < self._needed() or self.accounts.exhausted(number):
            logger.warning(
                "round %d: %d clients may take part, %d needed; ending the run",
                number,
                len(self.federation.eligible),
                self._needed(),
            )
            return False
        before = self.federation.participations.copy()
        messages = list(
            self.strategy.configure_train(number, to_record(self.state, "float32"), ConfigRecord(), self.grid)
        )
        drawn = sorted((self.federation.participations - before).keys())
        self.progress.round_started(number, len(drawn))
        with self.accounts.charge(number, drawn, self.strategy.sent_digest) as commit:
            replies = exchange(self.grid, messages, self.config.run.timeout, lambda reply: self.progress.node_done())
            arrays, _ = self.strategy.aggregate_train(number, replies)
            outcome = self.strategy.train_outcome
            self._warn(number, "is excluded from", outcome.excluded)
            self.accounts.settle(outcome, drawn)
            if not self._enough(number, outcome, drawn):
                return False
            assert arrays is not None
            state = from_record(arrays, "float32")
            commit(digest(state))
        self._check_moved(outcome)
        self.state = state
        train_seconds, aggregated = busy_seconds(outcome.busy), time.perf_counter()
        self._release(number, outcome)

        last = number == self.config.run.rounds or len(self.federation.eligible) < self._needed()
        evaluate = last or number % self.config.evaluate.every == 0
        evaluate_seconds = self._evaluate_server(number) if evaluate else 0.0
        if {"always": evaluate, "last": last, "never": False}[self.config.evaluate.clients]:
            evaluate_seconds += self._evaluate_clients(number)
        self.done = number
        self._account(number, outcome, started, train_seconds, evaluate_seconds, aggregated, evaluate)
        return True

    def _needed(self) -> int:
        """Fewest clients that must be there.

        Under client-level Poisson sampling an empty round is a round like any other.
        """
        return 0 if self.config.run.sampling == "poisson" else self.config.run.min_clients

    def _enough(self, number: int, outcome: TrainOutcome, drawn: list[str]) -> bool:
        """Whether the usable updates suffice.

        If only refusals are missing, the budget is what ended the run; otherwise it failed.
        """
        usable, needed = len(outcome.updates), max(self._needed(), 1 if drawn else 0)
        if usable >= needed:
            return True
        if all(client in self.federation.refused for client in outcome.excluded):
            return False
        reasons = "; ".join(f"{c}: {r}" for c, r in list(outcome.excluded.items())[:3])
        raise RunFailed(f"round {number}: {usable} usable updates, {needed} needed ({reasons})")

    def _release(self, number: int, outcome: TrainOutcome) -> None:
        """Countersign what was received, and let the clients keep their receipts."""
        receipts = self.accounts.close_round(number, self.strategy.sent_digest, digest(self.state), outcome)
        if receipts:
            self._exchange_lines(number, receipts, sorted(receipts, key=client_order))

    def _exchange_lines(self, number: int, receipts: Mapping[str, Entry], clients: list[str]) -> dict[str, str]:
        messages = self.strategy.release_messages(receipts, clients)
        problems = self.strategy.collect_lines(
            exchange(self.grid, messages, min(self.config.run.timeout, RECEIPT_SECONDS))
        )
        self._warn(number, "did not keep its receipt of", problems)
        return problems

    def _warn(self, number: int, what: str, problems: Mapping[str, str]) -> None:
        for client, reason in problems.items():
            logger.warning("%s %s round %d: %s", client, what, number, reason, extra={"round": number})

    def _account(
        self,
        number: int,
        outcome: TrainOutcome,
        started: float,
        train_seconds: float,
        evaluate_seconds: float,
        aggregated: float,
        evaluated: bool,
    ) -> None:
        """Totals, checkpoint, the train line of metrics.jsonl, and the line on the terminal."""
        epsilon = self.accounts.spent.worst() if self.config.private else NO_DP
        self.totals["bytes_up"] += outcome.bytes_up
        self.totals["bytes_down"] += outcome.bytes_down
        self.totals["excluded"] += len(outcome.excluded)
        self._checkpoint()
        seconds = time.perf_counter() - started
        overhead = max(0.0, seconds - train_seconds - evaluate_seconds)
        self.totals["round_seconds"] += seconds
        self.totals["overhead_seconds"] += overhead
        metrics = outcome.metrics.values()
        examples = sum(m["examples"] for m in metrics)
        loss = sum(m["loss"] * m["examples"] for m in metrics) / examples if examples else float("nan")
        self.events.write(
            "train",
            number,
            clients=sorted(outcome.updates),
            excluded=outcome.excluded,
            loss=loss,
            epsilon=epsilon,
            bytes_up=outcome.bytes_up,
            bytes_down=outcome.bytes_down,
            seconds=round(seconds, 4),
            train_seconds=round(train_seconds, 4),
            evaluate_seconds=round(evaluate_seconds, 4),
            overhead_seconds=round(overhead, 4),
            per_client=outcome.metrics,
        )
        scores = self.scores if evaluated else None
        worst_client = min(self.client_accuracy.values()) if evaluated and self.client_accuracy else None
        self.progress.round_done(
            RoundLine(number, scores, loss, epsilon, worst_client, len(outcome.updates), seconds, overhead)
        )

    def _evaluate_server(self, number: int) -> float:
        """Score the global model on the held-out test split, with all cores. Returns the seconds it took.

        Where clients keep a part of the model for themselves, there is no global model to score.
        """
        started = time.perf_counter()
        if self.strategy.personal:
            return 0.0
        self.progress.note("evaluating")
        with torch_threads(os.cpu_count() or 1):
            self.session.model.load(self.state)
            data = self.session.data
            self.scores = classify(self.session.model, data, data.test, self.config.evaluate.batch_size)
        self.events.write("evaluate", number, **vars(self.scores))
        return time.perf_counter() - started

    def _evaluate_clients(self, number: int) -> float:
        """Accuracy on each client's held-out examples. Returns the seconds in which at least one node was at it.

        Under DP a client is not asked for it (the noise does not cover it) unless it is to be shared: a simulation,
        which holds all the data anyway, measures it itself; a deployment goes without.
        """
        if not self.config.private or self.config.privacy.share_metrics:
            return self._ask_clients(number)
        started = time.perf_counter()
        if not self.federation.hosts:
            with torch_threads(os.cpu_count() or 1):
                self.session.model.load(self.state)
                self._record_clients(number, {c: self._score_client(c, number) for c in self.federation.clients})
        return time.perf_counter() - started

    def _score_client(self, client: str, number: int) -> float:
        """Accuracy of a simulated client on its held-out examples, with the model that is loaded or, where it keeps a
        part, its own.
        """
        data = self.session.data
        if self.strategy.personal:
            self.session.model.load(self.state | load_personal(self.personal, client, number + 1))
        return classify(self.session.model, data, data.local_test(client), self.config.evaluate.batch_size).accuracy

    def save_personal_adapters(self) -> None:
        """``personal/<client>/adapter`` of every simulated client that keeps a part of the model; deployed ones keep
        theirs themselves.
        """
        if not self.strategy.personal or self.federation.hosts:
            return
        for client in self.federation.clients:
            path = self.personal / client / "adapter"
            if (own := load_personal(self.personal, client, self.done + 1)) and not path.exists():
                save_adapter(self.session.model, self.state | own, path)

    def _ask_clients(self, number: int) -> float:
        messages = list(
            self.strategy.configure_evaluate(number, to_record(self.state, "float32"), ConfigRecord(), self.grid)
        )
        self.strategy.aggregate_evaluate(number, exchange(self.grid, messages, self.config.run.timeout))
        outcome = self.strategy.evaluate_outcome
        self._warn(number, "has no local accuracy in", outcome.excluded)
        self._record_clients(number, outcome.accuracy)
        return busy_seconds(outcome.busy)

    def _record_clients(self, number: int, accuracy: dict[str, float]) -> None:
        self.client_accuracy = accuracy
        self.events.write(
            "evaluate_clients", number, **cast("dict[str, Any]", spread(accuracy.values())), per_client=accuracy
        )

    def _check_moved(self, outcome: TrainOutcome) -> None:
        """A first round whose every update is zero means that nothing is being trained, whatever the loss says."""
        if self.adapter_moved or not outcome.updates:
            return
        watched = [
            n for n in self.strategy.sent_names(self.state) if self.strategy.trains == frozenset() or ".lora_" in n
        ]
        if not any(bool(update[name].any()) for update in outcome.updates.values() for name in watched):
            raise RunFailed("no client changed the adapter in the first round; check train.lr and lora.target_modules")
        self.adapter_moved = True

    def _checkpoint(self) -> None:
        extra = {
            "participations": dict(self.federation.participations),
            "totals": self.totals,
            "scores": vars(self.scores) if self.scores else None,
            "client_accuracy": self.client_accuracy,
            "ranks": self.federation.ranks,
            "max_clients_per_pass": self.federation.max_clients_per_pass,
        }
        save_checkpoint(self.directory, self.done, self.state, self.strategy.memory, extra)

    def _restore(self) -> None:
        if (found := load_checkpoint(self.directory)) is not None:
            self.done, self.state, memory, extra = found
            self.strategy.remember(memory)
            self.federation.ranks, self.federation.max_clients_per_pass = extra["ranks"], extra["max_clients_per_pass"]
            self.adapter_moved = True
            self.federation.participations.update(extra["participations"])
            self.totals = extra["totals"]
            self.scores = Scores(**extra["scores"]) if extra["scores"] else None
            self.client_accuracy = extra["client_accuracy"]
        if (
            self.config.private and self.config.privacy.noise == "secure"
        ):  # a round that was cut off released something of its own
            for client in self.federation.clients:
                self.federation.participations[client] += self.accounts.rounds_charged_after(client, self.done)

    def finish(self, status: str) -> None:
        """Ask once more for ledgers that were not seen, then seal the accounts.

        Call when the adapter is on the disk.
        """
        if silent := self.accounts.unseen():
            problems = self._exchange_lines(self.done, {}, silent)
            self.accounts.see([client for client in silent if client not in problems])
        self.accounts.finish(digest(self.state), status)

    def result(self) -> dict[str, Any]:
        """What ``result.json`` says, apart from the status and the wall time."""
        privacy, scores = self.accounts.result(), self.scores
        per_client = privacy.pop("clients")
        clients = {
            client: {
                "examples": info.examples,
                "participations": self.federation.participations[client],
                "accuracy": self.client_accuracy.get(client),
                **per_client.get(client, {"epsilon": NO_DP}),
                **({"rank": self.federation.ranks[client]} if self.config.clients.rank else {}),
                **({"refused": self.federation.refused[client]} if client in self.federation.refused else {}),
            }
            for client, info in self.federation.clients.items()
        }
        return {
            "strategy": self.config.strategy.name,
            "rounds": self.done,
            "accuracy": scores.accuracy if scores else None,
            "macro_f1": scores.macro_f1 if scores else None,
            "loss": scores.loss if scores else None,
            "client_accuracy": spread(self.client_accuracy.values()),
            **privacy,
            "bytes_up": self.totals["bytes_up"],
            "bytes_down": self.totals["bytes_down"],
            "excluded": self.totals["excluded"],
            "overhead_seconds_per_round": round(self.totals["overhead_seconds"] / self.done, 4) if self.done else None,
            "seconds_per_round": round(self.totals["round_seconds"] / self.done, 4) if self.done else None,
            "adapter_digest": digest(self.state),
            "clients": clients,
        }


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals: the time in which at least one node was working."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def spread(accuracies: Iterable[float]) -> dict[str, float | None]:
    """Mean, worst and population standard deviation over clients; None without any."""
    values = [a for a in accuracies if a == a]
    if not values:
        return {"mean": None, "worst": None, "std": None}
    return {"mean": statistics.fmean(values), "worst": min(values), "std": statistics.pstdev(values)}
