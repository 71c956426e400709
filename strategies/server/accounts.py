"""The server's accounts of a private run: who was charged what, receipts for it, and the seal at the end.

Under unit "example" the clients keep ledgers and the server checks and countersigns them. Under unit "client" the
server adds the noise, so the ledger is its own and every client of the population is charged.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from fedlab.config import RunConfig
from fedlab.data.sources import identity
from fedlab.errors import PrivacyError, Unwritable
from fedlab.privacy.accounting import Event
from fedlab.privacy.client_level import ClientPlan, make_client_plan
from fedlab.privacy.ledger.claims import privacy_claims
from fedlab.privacy.ledger.guard import Guard
from fedlab.privacy.ledger.keys import keyed_hash
from fedlab.privacy.ledger.ledger import SERVER, Entry, Ledger, charged, events
from fedlab.privacy.ledger.mirror import LedgerMirror
from fedlab.privacy.ledger.spending import PrivacySpent
from fedlab.privacy.ledger.terms import budget_terms, run_terms, scope_of
from fedlab.privacy.noise_share import NoiseShare
from fedlab.privacy.plan import plan_of
from fedlab.privacy.release import public_names
from fedlab.run.directory import RunDirectory
from fedlab.run.places import ledger_directory
from strategies.server.federation import Federation
from strategies.server.outcome import TrainOutcome


class Accounts:
    """Empty for a run without DP: every method then does nothing."""

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self.config, self._directory = config, directory
        self.ledgers = ledger_directory(config, directory.path)
        self._mirror: LedgerMirror | None = None
        self._guard: Guard | None = None
        if config.private:
            self.ledgers.mkdir(parents=True, exist_ok=True)
            self._mirror = LedgerMirror(directory.path, directory.run_id, self.ledgers)
        self.plan: ClientPlan | None = make_client_plan(config) if config.privacy.unit == "client" else None
        self.spent = PrivacySpent({})

    @property
    def mirror(self) -> LedgerMirror | None:
        """What is known of the clients' ledgers; None if they keep none."""
        return self._mirror if self.config.privacy.unit == "example" else None

    def begin(self, federation: Federation, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Sign the server's own plan if it has one. Raises PrivacyError if too few clients can afford a round."""
        self._federation = federation
        if self._mirror is None:
            return
        self._dimension = sum(math.prod(shape) for shape in shapes.values())
        if self.plan is None:
            self._check_shares(federation)
            self.spent = PrivacySpent(
                {client: info.delta for client, info in federation.clients.items() if info.event is not None}
            )
            for client in self.spent.deltas:
                self.spent.record(client, self._mirror.events(client))
            for client in federation.recalled:  # of the round that was cut off
                event = federation.clients[client].event
                assert event is not None
                self.spent.assume(client, event)
            if len(federation.eligible) < self.config.run.min_clients and federation.refused:
                client, reason = next(iter(federation.refused.items()))
                if reason.startswith("storage:") and not federation.hosts:
                    raise Unwritable(self.ledgers, "a client could not begin its ledger")
                raise PrivacyError(
                    f"{len(federation.eligible)} clients can take part, {self.config.run.min_clients} needed; {client}:"
                    f" {reason}"
                )
            return
        self._mirror.start("client", self._directory.file_digest("run.toml"))
        key, budget = self._mirror.key, self.config.privacy.budget
        ledger = Ledger(
            self.ledgers / f"{SERVER}.jsonl", SERVER, keyed_hash(key, "dataset", identity(self.config.data)), key
        )
        self._guard = Guard(ledger, self._directory.run_id)
        self._terms: dict[str, Any] = {
            **self.plan.terms(),
            **run_terms(federation.run.configuration, public_names(self.config)),
            "scope": scope_of(shapes),
            "budget": budget_terms(budget.epsilon, budget.delta or self.plan.delta) if budget else None,
            "content": None,
        }
        if refusal := self._guard.plan(self._terms, {}):
            raise refusal
        self.spent = PrivacySpent(dict.fromkeys(federation.clients, self.plan.delta))
        self._record_population()

    def _check_shares(self, federation: Federation) -> None:
        """Leave out whoever signed other shares of noise than the rest: each one's claim rests on the others'.

        Raises ConfigError for a sum that could overflow, or whose shares do not add up to one discrete Gaussian.
        """
        privacy, sizes = self.config.privacy, []
        if privacy.survivors is None or self._mirror is None:
            return
        shared = NoiseShare(privacy.survivors, privacy.colluding)
        tasks = 1 if self.config.stream.joint else len(self.config.tasks)
        for client, info in federation.clients.items():
            signed = self._mirror.plan(client)
            if signed is None or info.event is None or client in federation.refused:
                continue
            # one for all clients: of a task's examples it has nothing but that δ is small beside their number
            plan = plan_of(self.config, info.examples, [info.examples] * max(1, tasks))
            expected = plan.event(), plan.delta.hex(), plan.shared_terms(self._dimension)
            if (info.event, signed["delta"], signed.get("shared")) != expected:
                federation.refused[client] = "it signed other shares of noise than this run's configuration makes"
                continue
            sizes.append(info.examples)
            shared.check_distance(plan.sigma, self._dimension, self.config.clients_per_round)
            shared.check_overflow(sorted(sizes)[-self.config.clients_per_round :], plan.sigma, self._dimension)

    def enrol(self, client: str) -> None:
        """Count what a client that came later was charged before."""
        self._check_shares(self._federation)
        info = self._federation.clients[client]
        if self.plan is not None:
            self.spent.enrol(client, self.plan.delta)
            self._record_population()
        elif self.mirror is not None and info.event is not None:
            self.spent.enrol(client, info.delta)
            self.spent.record(client, self.mirror.events(client))

    def exhausted(self, round_number: int) -> bool:
        """Whether the server's own budget cannot cover a further round (unit "client" only)."""
        return self._guard is not None and self._guard.exhausted(self._terms, round_number)

    @contextmanager
    def charge(self, round_number: int, drawn: list[str], received: str) -> Iterator[Callable[[str], None]]:
        """Around one round of training; yields what commits its result.

        Whoever is asked counts as charged until its ledger is seen.
        """
        if self._guard is None:
            for client in drawn if self._mirror else []:
                event = self._federation.clients[client].event
                assert event is not None
                self.spent.assume(client, event)
            yield lambda state: None
            return
        try:
            with self._guard.charge(self._terms, round_number, received) as commit:
                yield lambda state: commit(1, state)
        finally:
            self._record_population()

    def settle(self, outcome: TrainOutcome, drawn: list[str]) -> None:
        """After the replies: ledgers that came back are the truth, silent clients stay charged, and so do updates
        without their charge.
        """
        if self.mirror is not None:
            for client in drawn:
                event = self._federation.clients[client].event
                if client not in outcome.silent:
                    self.spent.record(client, self.mirror.events(client))
                elif event is not None:
                    for _ in range(outcome.again[client]):
                        self.spent.assume(client, event)
                if client in outcome.unproven and event is not None:
                    self.spent.assume(client, event, for_good=True)

    def close_round(
        self, round_number: int, states: tuple[str, str, str], outcome: TrainOutcome, released: bool = True
    ) -> dict[str, Entry]:
        """Receipts for the updates of a round, on the disk when this returns; empty if clients keep no ledgers.

        Of a round that released nothing what came has its receipt, and is named as used nowhere.

        Args:
            round_number: from 1.
            states: digests of the state before, as it was sent, and after.
            outcome: what came.
            released: whether it went into the state.
        """
        if self._mirror is None:
            return {}
        commits = {client: outcome.commits[client] for client in outcome.used if client in outcome.commits}
        used = outcome.used if released else []
        updates = {client: commits[client]["out"] if client in commits else None for client in used}
        return self._mirror.close_round(round_number, states, updates, commits)

    def rounds_charged_after(self, client: str, round_number: int) -> int:
        """Charges of this run for later rounds: rounds that were cut off, and under secure noise released something
        new. What a client on a machine of its own committed to in the next one it gives again, for no further charge.
        """
        entries = self._mirror.entries(client) if self._mirror else []
        later = [e for e in charged(entries, self._directory.run_id) if e["round"] > round_number]
        committed = {e["charge"] for e in entries if e["type"] == "COMMIT"}
        kept = any(e["round"] == round_number + 1 and e["hash"] in committed for e in later)
        return len(later) - (1 if kept and self._federation.hosts else 0)

    def expect(self, clients: list[str], event: Event) -> None:
        """These clients are asked for a release beside the rounds: it counts as spent until their ledger is seen."""
        for client in clients if self.mirror is not None else []:
            self.spent.assume(client, event)

    def see(self, clients: list[str]) -> None:
        """These clients' ledgers are complete now: nothing needs to be assumed of them."""
        for client in clients:
            if self.mirror is not None:
                self.spent.record(client, self.mirror.events(client))

    def finish(self, files: Mapping[str, tuple[int, str]], state: str, status: str) -> None:
        """Seal a run that ended by itself: its ledgers, its files (path → size and SHA-256), its last state."""
        if self._mirror is None:
            return
        self._mirror.final(files, state, status, {SERVER: self._guard.ledger.entries[-1]} if self._guard else {})

    def close_ledger(self) -> None:
        """The server's own ledger says that the run is over."""
        if self._guard is not None:
            self._guard.close()

    def destroy_keys(self) -> None:
        """Keys that only this run used go, so that nobody can add a line later.

        Last of all: a run cut off before can still be resumed.
        """
        if self._mirror is not None and self.config.privacy.ledger is None:
            shutil.rmtree(self._directory.path / "ledger" / "keys", ignore_errors=True)

    def result(self) -> dict[str, Any]:
        """What the run claims: ``fedlab.privacy.ledger.claims``, from the ledgers as they are on the disk now."""
        run, deltas = self._directory.run_id, self.spent.deltas
        if self._guard is not None:
            with self._guard.ledger.locked():  # an interrupt may have left memory behind the file
                own = list(self._guard.ledger.refreshed())
                if self.config.privacy.ledger is not None:  # a copy for the run directory: the original goes on
                    shutil.copy(self._guard.ledger.path, self._directory.path / "ledger" / f"{SERVER}.jsonl")
            return privacy_claims(self.config, run, dict.fromkeys(deltas, own), deltas, {})
        if self._mirror is not None and not self._federation.hosts:
            for client in deltas:
                with suppress(PrivacyError):  # of a ledger that is not what it was, what was assumed stays
                    self._mirror.catch_up(client)
                    self.spent.record(client, self._mirror.events(client))
        ledgers = {client: self._mirror.entries(client) for client in deltas} if self._mirror else {}
        return privacy_claims(self.config, run, ledgers, deltas, {c: self.spent.assumed(c) for c in deltas})

    def _record_population(self) -> None:
        assert self._guard is not None
        spent = events(self._guard.ledger.entries)
        for client in self._federation.clients:
            self.spent.record(client, spent)
