"""The round loop: configure → train → aggregate → evaluate, with everything that Flower's ``Strategy.start()`` lacks.

It resumes from a checkpoint, ends early when nobody may take part any more, survives clients that fail, and measures
itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.clients import initial_ranks
from fedlab.errors import RunFailed, Unwritable
from fedlab.lora.state import State, digest, nbytes, part_of
from fedlab.privacy.ledger.ledger import Entry
from fedlab.privacy.promise import NO_DP
from fedlab.privacy.scores_plan import scores_event
from fedlab.run.checkpoint import load_checkpoint, save_checkpoint
from fedlab.run.directory import RunDirectory
from fedlab.run.metrics import MetricsLog
from fedlab.run.places import LOG
from fedlab.run.progress import Progress, RoundLine
from fedlab.seeds import client_order
from fedlab.session import Session
from fedlab.train.check_gradients import check_trainable
from fedlab.train.cohort import supports_fused
from fedlab.train.memory import plan_memory
from strategies import STRATEGIES
from strategies.base import ServerState, Strategy
from strategies.server.accounts import Accounts
from strategies.server.aggregation import aggregate, check_moved, warn_of_products
from strategies.server.discovery import Discovery, run_reference
from strategies.server.federation import Federation
from strategies.server.heads import trained_names
from strategies.server.messages import Messenger, TrainingOrder
from strategies.server.outcome import TrainOutcome, busy_seconds, mean_loss
from strategies.server.outliers import set_outliers_aside
from strategies.server.scoring import Scoring
from strategies.server.secure_sum import destroy_keys
from strategies.server.server_data import ServerData
from strategies.server.shared_round import SumMessenger, Unreleased
from strategies.server.task_start import first_state

logger = logging.getLogger("fedlab")
SECONDS = ("round_seconds", "overhead_seconds")  # totals


class Rounds:
    """State of one run on the server: adapter, strategy, what was spent, totals."""

    session: Session
    strategy: Strategy

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        directory: RunDirectory,
        events: MetricsLog,
        progress: Progress,
        data: ServerData,
    ) -> None:
        self.grid, self.config, self.data = grid, config, data
        self.directory, self.events, self.progress = directory, events, progress
        self.basis_bytes = 0
        self.state: State = {}
        self.memory: dict[str, Tensor] = {}  # what the task before left, in a stream
        self.server_state: ServerState = {}  # the strategy's own
        strategy = STRATEGIES[config.strategy.name]
        self.accounts = Accounts(config, directory)
        self.personal = directory.path / "personal"  # of simulated clients
        self.federation = self._discover(strategy)
        messenger = SumMessenger if config.shared_noise else Messenger
        self.messenger = messenger(grid, config, self.federation, self.strategy)
        self.unreleased = Unreleased(config.privacy.survivors or 0)
        self.accounts.begin(self.federation, self.session.scope(self.strategy.trained_parts(config)))
        self.done, self.adapter_moved = 0, False
        self.scoring = Scoring(config, self.session, events, self.strategy.personal, self.personal)
        self.totals = {"bytes_up": 0, "bytes_down": self.basis_bytes, "excluded": 0} | dict.fromkeys(SECONDS, 0.0)
        self._restore()
        self._plan_memory()

    def _discover(self, strategy: type[Strategy]) -> Federation:
        """Find the clients, open the session and make the first state.

        Nodes load their model while the server loads its own, unless they are to be told what stays as it is.
        """
        config, basis = self.config, State()
        if strategy.static:
            self._begin(strategy)
            basis = {name: value for name, value in self.state.items() if part_of(name) in strategy.static}
            self.session = replace(self.session, basis=basis)
        run = run_reference(self.directory, config, strategy.trained_parts(config), basis)
        load = (lambda: None) if strategy.static else self.data.open
        self.discovery = Discovery(self.grid, self.directory, config, run, self.data, self.accounts.mirror, basis)
        federation = self.discovery.begin(load)
        if not strategy.static:
            self._begin(strategy)
        self.basis_bytes = len(federation.clients) * nbytes(basis)
        return federation

    def _begin(self, strategy: type[Strategy]) -> None:
        """Open the session, make the strategy, and what the first round starts from."""
        self.session = self.data.open()
        self.strategy = strategy(self.config, self.session.model)
        self.state, self.memory = first_state(self.config, self.strategy, self.session)
        check_trainable(self.session.model, self.config, trained_names(self.strategy, self.state))
        self.server_state = self.strategy.init(self.state)

    def _plan_memory(self) -> None:
        """How many clients may share a pass.

        Said once and kept with the run, because it decides how sums are rounded.
        """
        trained = trained_names(self.strategy, self.state)
        fused = self.config.train.gradients == "fused" and supports_fused(self.session.model, trained)
        if self.federation.hosts or not fused:
            return
        asked = self.federation.max_clients_per_pass or min(self.config.cohort_size, self.config.clients_per_round)
        plan = plan_memory(self.session, self.state, trained, asked)
        self.federation.max_clients_per_pass = self.federation.max_clients_per_pass or plan.clients
        logger.info("%s", plan)
        self.progress.remark(str(plan))

    def run(self) -> str:
        """Run the remaining rounds. Returns the status, ``completed`` or ``budget-exhausted``; raises RunFailed."""
        logger.info("%s: %s", type(self.strategy).__name__, self.strategy.options.model_dump())
        if self.done == 0:
            warn_of_products(self.strategy, self.state)
            self._evaluate_model(0)
            self.scoring.measure_public("before", 0, self.state, self.directory)
        status = "completed"
        for round_number in range(self.done + 1, self.config.run.rounds + 1):
            if not self._round(round_number):
                status = "budget-exhausted"
                break
        self.scoring.measure_public("after", self.done, self.state, self.directory)
        return status

    def _round(self, number: int) -> bool:
        """One round; False if too few clients may still take part."""
        started = time.perf_counter()
        for client in self.discovery.welcome(self.federation):
            self.accounts.enrol(client)
        if self._out_of_clients(number):
            return False
        self.discovery.await_clients(self.federation, self._needed())
        outcome = self._train(number)
        if outcome is None:
            return False
        last = number == self.config.run.rounds or len(self.federation.eligible) < self._needed()
        evaluate = last or number % self.config.evaluate.every == 0
        evaluate_seconds = self._evaluate_model(number) if evaluate else 0.0
        if {"always": evaluate, "last": last, "never": False}[self.config.evaluate.clients]:
            evaluate_seconds += self._evaluate_clients(number)
        self.done = number
        for name in ("bytes_up", "bytes_down"):
            self.totals[name] += getattr(outcome, name)
        self.totals["excluded"] += len(outcome.excluded)
        self._checkpoint()
        self._report(number, outcome, time.perf_counter() - started, evaluate_seconds, evaluate)
        return True

    def _out_of_clients(self, number: int) -> bool:
        """Whether too few clients may still take part, or the server's own budget is spent."""
        left, needed = len(self.federation.eligible), self._needed()
        if left >= needed and not self.accounts.exhausted(number):
            return False
        if left < needed <= left + len(self.federation.unfit):  # no budget ended it
            reasons = "; ".join(f"{client}: {reason}" for client, reason in list(self.federation.unfit.items())[:3])
            raise RunFailed(f"round {number}: {left} clients may take part, {needed} needed ({reasons})")
        logger.warning("round %d: %d clients may take part, %d needed; ending the run", number, left, needed)
        return True

    def _train(self, number: int) -> TrainOutcome | None:
        """Draw clients, let them train, aggregate, and countersign; None if only refusals are missing."""
        drawn = self.messenger.prepared(number, self.federation.draw(number))
        order = self.messenger.order_training(number, self.state, self.client_ranks, drawn)
        self.progress.round_started(number, len(drawn))
        with self.accounts.charge(number, drawn, order.received) as commit:
            outcome = self._trained(order, drawn)
            if self.config.privacy.unit != "client" and not self.config.shared_noise:
                set_outliers_aside(outcome, self.config.run.outlier)
            self._warn(number, "is excluded from", outcome.excluded)
            self.accounts.settle(outcome, drawn)
            state, server_state = self.state, self.server_state
            self.messenger.finish(number, outcome)
            released = self.unreleased.judge(number, outcome) if self.config.shared_noise else True
            if not self.config.shared_noise and not self._enough(number, outcome, drawn):
                return None
            if released:
                state, server_state = aggregate(
                    self.strategy, self.federation, self.accounts.plan, state, server_state, outcome, number
                )
            commit(digest(state))
        self.adapter_moved = self.adapter_moved or check_moved(self.strategy, self.state, outcome)
        before = digest(self.state) if self.config.private else ""
        self.state, self.server_state = state, server_state
        self._release(number, (before, order.received, digest(state)), outcome, released)
        return outcome

    def _trained(self, order: TrainingOrder, drawn: list[str]) -> TrainOutcome:
        """What the clients answer. In a deployment those that are missing are asked again, as often as that is set, if
        the round would fail without them: who answered before gives the same answer, for no further charge.
        """
        outcome = self.messenger.train(order, self.progress.node_done)
        for _ in range(self.discovery.retries):
            missing = {client for client in drawn if client in outcome.silent}
            if len(outcome.used) >= max(self._needed(), 1) or not missing:
                break
            nodes = self.discovery.await_back({self.federation.hosts[client] for client in missing})
            logger.warning("round %d: %d of %d missing nodes are asked again", order.number, len(nodes), len(missing))
            outcome.add(self.messenger.train(order.to(nodes), self.progress.node_done))
        return outcome

    def _needed(self) -> int:
        """Fewest clients that must be there.

        Under client-level Poisson sampling an empty round is a round like any other; under shared noise fewer would
        release nothing.
        """
        if self.config.run.sampling == "poisson":
            return 0
        return max(self.config.run.min_clients, self.config.privacy.survivors or 0)

    def _enough(self, number: int, outcome: TrainOutcome, drawn: list[str]) -> bool:
        """Whether the usable updates suffice.

        If only refusals are missing, the budget is what ended the run; otherwise it failed.
        """
        usable, needed = len(outcome.updates), max(self._needed(), 1 if drawn else 0)
        if usable >= needed:
            return True
        if set(outcome.excluded) <= set(self.federation.refused) - set(self.federation.unfit):
            return False
        if not self.federation.hosts and all("storage:" in reason for reason in outcome.excluded.values()):
            raise Unwritable(self.accounts.ledgers, "no client could write its ledger, or what it keeps")
        reasons = "; ".join(f"{c}: {r}" for c, r in list(outcome.excluded.items())[:3])
        path = self.directory.path
        log = f"each client's own log, then: fedlab resume {path}" if self.federation.hosts else path / LOG
        raise RunFailed(f"round {number}: {usable} usable updates, {needed} needed ({reasons}); see {log}")

    @property
    def client_ranks(self) -> dict[str, int]:
        """client → rank of its adapter in the next round: the state's, or what clients.rank or the strategy says."""
        widest = max(len(value) for name, value in self.state.items() if part_of(name) == "lora_A")
        given = initial_ranks(self.config, list(self.federation.clients)) if self.config.clients.rank else {}
        everyone = dict.fromkeys(self.federation.clients, widest)
        return everyone | given | self.strategy.client_ranks(self.server_state)

    def _release(self, number: int, states: tuple[str, str, str], outcome: TrainOutcome, released: bool) -> None:
        """Countersign what was received, and let the clients keep their receipts."""
        receipts = self.accounts.close_round(number, states, outcome, released)
        if receipts:
            self._exchange_lines(number, receipts, sorted(receipts, key=client_order))

    def _exchange_lines(
        self, number: int, receipts: Mapping[str, Entry], clients: list[str], closing: bool = False
    ) -> dict[str, str]:
        problems = self.messenger.receipts(receipts, clients, closing)
        self._warn(number, "did not keep its receipt of", problems)
        return problems

    def _warn(self, number: int, what: str, problems: Mapping[str, str]) -> None:
        for client, reason in problems.items():
            logger.warning(
                "%s %s round %d: %s", client, what, number, reason, extra={"round": number, "client": client}
            )

    def _report(
        self, number: int, outcome: TrainOutcome, seconds: float, evaluate_seconds: float, evaluated: bool
    ) -> None:
        """The train line of metrics.jsonl, and the line on the terminal."""
        epsilon = self.accounts.spent.worst() if self.config.private else NO_DP
        train_seconds = min(busy_seconds(outcome.busy), seconds)  # by the nodes' own clocks, which may jump
        overhead = max(0.0, seconds - train_seconds - evaluate_seconds)
        self.totals["round_seconds"] += seconds
        self.totals["overhead_seconds"] += overhead
        loss = mean_loss(outcome)
        self.events.write(
            "train",
            number,
            clients=sorted(outcome.used),
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
            **({"released": not self.unreleased.in_a_row} if self.config.shared_noise else {}),
        )
        scores = self.scoring.scores if evaluated else None
        worst_client = self.scoring.worst_client if evaluated else None
        self.progress.round_done(
            RoundLine(number, scores, loss, epsilon, worst_client, len(outcome.used), seconds, overhead)
        )

    def _evaluate_model(self, number: int) -> float:
        self.progress.note("evaluating")
        return self.scoring.score_model(number, self.state)

    def _evaluate_clients(self, number: int) -> float:
        """Each client's score on its held-out examples. Returns the seconds in which at least one node was at it.

        Under DP a client is not asked unless it is to be shared, or leaves with noise of its own: a simulation, which
        holds all the data anyway, measures it itself; a deployment goes without.
        """
        noised = self.config.privacy.scores_sigma
        if noised is not None:  # charged before it is looked at, and counted as spent until the ledgers are seen
            self.accounts.expect(self.federation.there, scores_event(noised))
        if not self.config.private or self.config.privacy.share_metrics or noised is not None:
            outcome = self.messenger.evaluate(number, self.state)
            self._warn(number, "has no local score in", outcome.excluded)
            self.scoring.take(number, outcome.scores)
            return busy_seconds(outcome.busy)
        return 0.0 if self.federation.hosts else self.scoring.score_clients(number, self.state, self.federation.clients)

    def save_personal_adapters(self) -> None:
        """The adapters of simulated clients that keep a part of the model; deployed ones keep theirs themselves."""
        if not self.federation.hosts:
            self.scoring.save_personal_adapters(self.state, self.done, self.federation.clients)

    def _checkpoint(self) -> None:
        extra = {
            "participations": dict(self.federation.participations),
            "totals": self.totals,
            **self.scoring.kept(),
            "max_clients_per_pass": self.federation.max_clients_per_pass,
            "unreleased": [self.unreleased.rounds, self.unreleased.in_a_row],
        }
        save_checkpoint(self.directory, self.done, self.state, self.server_state, extra)

    def _restore(self) -> None:
        if (found := load_checkpoint(self.directory)) is not None:
            self.done, self.state, self.server_state, extra = found
            self.federation.max_clients_per_pass = extra["max_clients_per_pass"]
            self.adapter_moved = True
            self.federation.participations.update(extra["participations"])
            self.totals = extra["totals"]
            self.unreleased.rounds, self.unreleased.in_a_row = extra.get("unreleased", (0, 0))
            self.scoring.restore(extra)
        if self.config.private and self.config.privacy.noise == "secure":  # what was cut off released its own
            for client in self.federation.clients:
                self.federation.participations[client] += self.accounts.rounds_charged_after(client, self.done)

    def close(self) -> None:
        """Let every client say in its ledger that the run is over, and take the lines that were not seen yet."""
        if self.accounts.mirror is not None:
            clients = [c for c in self.federation.reachable(self.federation.clients) if self.federation.known(c)]
            problems = self._exchange_lines(self.done, {}, clients, closing=True)
            self.accounts.see([client for client in clients if client not in problems])
        self.accounts.close_ledger()
        if not self.federation.hosts:
            destroy_keys(self.config, self.directory.path)

    def seal(self, files: Mapping[str, tuple[int, str]], status: str) -> None:
        """The last line of the server's file. ``files``: path in the run directory → size and SHA-256."""
        self.accounts.finish(files, digest(self.state), status)

    def result(self) -> dict[str, Any]:
        """What ``result.json`` says, apart from the status and the wall time."""
        privacy = self.accounts.result()
        per_client, ranks = privacy.pop("clients"), self.client_ranks if self.config.clients.rank else {}
        clients = {
            client: {
                "examples": info.examples,
                "participations": self.federation.participations[client],
                "score": self.scoring.client_scores.get(client),
                **per_client.get(client, {"epsilon": 0.0 if self.config.private else NO_DP}),
                **({"rank": ranks[client]} if ranks else {}),
                **({"refused": self.federation.refused[client]} if client in self.federation.refused else {}),
            }
            for client, info in self.federation.clients.items()
        }
        return {
            "strategy": self.config.strategy.name,
            "rounds": self.done,
            **self.scoring.result(),
            **privacy,
            "bytes_up": self.totals["bytes_up"],
            "bytes_down": self.totals["bytes_down"],
            "excluded": self.totals["excluded"],
            **({"unreleased_rounds": self.unreleased.rounds} if self.config.shared_noise else {}),
            "overhead_seconds_per_round": round(self.totals["overhead_seconds"] / self.done, 4) if self.done else None,
            "seconds_per_round": round(self.totals["round_seconds"] / self.done, 4) if self.done else None,
            "adapter_digest": digest(self.state),
            "clients": clients,
        }
