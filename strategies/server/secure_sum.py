"""The server's part in secure sums: who is asked what, and what is made of the answers.

Two exchanges a sum where nobody drops out: the one whose answers are masked, and ``unmask``, with which the next sum is
prepared. ``confirm`` comes between them if somebody did.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.serverapp import Grid

from fedlab.config import RunConfig
from fedlab.errors import SumRefused
from fedlab.privacy.secure_sum.coordinator import Coordinator
from fedlab.privacy.secure_sum.settings import Purpose, bounds, name_of, subject_of
from fedlab.protocol.failures import explained
from fedlab.protocol.sum_messages import (
    Confirmation,
    ConfirmReply,
    ConfirmRequest,
    Preparation,
    PrepareReply,
    PrepareRequest,
    Revealed,
    SumOrder,
    SumSetting,
    UnmaskReply,
    UnmaskRequest,
)
from fedlab.run.places import simulated_places
from strategies.server.exchange import Answers, ask
from strategies.server.federation import Federation

logger = logging.getLogger("fedlab")
ATTEMPTS = 4  # at preparing a sum: without those that did not answer, or under another name than before a crash
R = TypeVar("R", PrepareReply, ConfirmReply, UnmaskReply)
Mine = TypeVar("Mine", Preparation, Confirmation, Revealed)


def destroy_keys(config: RunConfig, run_path: Path) -> None:
    """Delete the keys of a simulation's clients, which lie in its run's directory, when it is over."""
    shutil.rmtree(simulated_places(config, run_path).store / "keys", ignore_errors=True)


class SecureSum:
    """One secure sum after another: ``prepare``, then requests that carry ``order(...)``, then ``unmask``.

    Args:
        grid: carries the messages.
        config: of the run; says how many clients a sum needs, and how many may collude.
        federation: who is there, and the clients' keys of their enrolment.
    """

    def __init__(self, grid: Grid, config: RunConfig, federation: Federation) -> None:
        self._grid, self._config, self._federation = grid, config, federation
        self._sum: Coordinator | None = None
        self._following: Coordinator | None = None

    def prepare(self, purpose: Purpose, number: int, drawn: Collection[str]) -> list[str]:
        """The participants of a sum, prepared: those of ``drawn`` that answered. Empty if they are too few.

        What ``unmask`` prepared for these very clients is used, and no message sent for it. Who declines once is asked
        again, as all are, under another name: it may have prepared this one with others, before somebody came back or
        the server was cut off.
        """
        clients = [client for client in drawn if client in self._federation.sum_keys]
        before: set[str] = set()
        for attempt in range(ATTEMPTS):
            coordinator = self._coordinator(purpose, number, attempt, clients)
            if coordinator is None:
                break
            missing = [client for client in clients if client not in coordinator.prepared]
            declined = self._ask_to_prepare(coordinator, missing) if missing else set()
            if len(coordinator.prepared) == len(clients):
                self._sum, self._following = coordinator, None
                return clients
            if coordinator.prepared or declined:
                clients = [c for c in clients if c in coordinator.prepared or c in declined - before]
            before = declined
        logger.warning("%s %d: %d clients could prepare a secure sum, which is too few", purpose, number, len(clients))
        return []

    def order(self, clients: Iterable[str]) -> SumOrder:
        """What goes with the request to a node that answers for these clients."""
        assert self._sum is not None
        return self._sum.order(clients)

    def unmask(
        self,
        total: Mapping[str, np.ndarray],
        inside: Collection[str],
        following: tuple[Purpose, int, Collection[str]] | None = None,
    ) -> dict[str, np.ndarray] | None:
        """The sum of what the clients masked; None, and a line in the log, if it cannot be had.

        Args:
            total: sum of the masked values that came, modulo 2⁶⁴.
            inside: whose they are.
            following: purpose, number and clients of the next sum, to be prepared in the same exchange.
        """
        coordinator = self._sum
        assert coordinator is not None
        setting = coordinator.setting
        dropped = tuple(sorted(set(setting.participants) - set(inside)))
        if len(inside) < setting.survivors:
            self._warn(f"{len(inside)} clients' values came, {setting.survivors} are needed")
            return None
        confirmed = self._confirmed(coordinator, inside, dropped) if dropped else {}
        if dropped and len(confirmed) < coordinator.graph.quorum:
            self._warn(f"{len(confirmed)} clients confirmed who dropped out, {coordinator.graph.quorum} are needed")
            return None
        self._following = self._next(following)
        shares = self._revealed(coordinator, inside, dropped, confirmed)
        try:
            return coordinator.unmasked(total, inside, shares)
        except SumRefused as error:
            self._warn(str(error))
            return None

    def _warn(self, reason: str) -> None:
        assert self._sum is not None
        logger.warning("the secure sum %s gives nothing: %s", self._sum.setting.name, reason)

    def _coordinator(self, purpose: Purpose, number: int, attempt: int, clients: list[str]) -> Coordinator | None:
        """Of a sum of these clients: the one that is prepared already, or a new one. None if they are too few."""
        found = self._following
        if found is not None and attempt == 0:
            same = subject_of(found.setting.name) == (purpose, number) and set(found.setting.participants) == set(
                clients
            )
            if same:
                return found
        survivors, colluding = bounds(self._config, purpose, len(clients))
        if len(clients) < survivors:
            return None
        keys = self._federation.sum_keys
        identities = {client: keys[client].identity for client in clients}
        setting = SumSetting(name_of(purpose, number, attempt), survivors, colluding, identities)
        return Coordinator(self._federation.run.run, setting, {client: keys[client] for client in clients})

    def _next(self, following: tuple[Purpose, int, Collection[str]] | None) -> Coordinator | None:
        if following is None:
            return None
        purpose, number, drawn = following
        clients = [client for client in drawn if client in self._federation.sum_keys]
        return self._coordinator(purpose, number, 0, clients)

    def _ask_to_prepare(self, coordinator: Coordinator, clients: list[str]) -> set[str]:
        """Take what these clients prepare. Who declined."""
        cohorts, run = self._federation.cohorts(clients), self._federation.run
        requests = {
            node: PrepareRequest(run, tuple(cohort), coordinator.plan(cohort)) for node, cohort in cohorts.items()
        }
        answers = ask(
            self._grid, "prepare", requests, PrepareReply, self._config.run.timeout, dict.fromkeys(requests, 0)
        )
        found = {node: reply.clients for node, reply in answers.replies.items()}
        self._accept(coordinator, self._by_client(cohorts, answers, found, "prepared nothing").values())
        return {mine.client for replies in found.values() for mine in replies if mine.failure is not None}

    def _accept(self, coordinator: Coordinator, preparations: Iterable[Preparation]) -> None:
        for preparation in preparations:
            if (problem := coordinator.accept(preparation)) is not None:
                logger.warning("%s is not in %s: %s", preparation.client, coordinator.setting.name, problem)

    def _confirmed(self, coordinator: Coordinator, inside: Collection[str], dropped: tuple[str, ...]) -> dict[str, str]:
        """Who signed that these dropped out, and the signatures."""
        cohorts, run = self._federation.cohorts(list(inside)), self._federation.run
        name = coordinator.setting.name
        requests = {node: ConfirmRequest(run, tuple(cohort), name, dropped) for node, cohort in cohorts.items()}
        answers = ask(
            self._grid, "confirm", requests, ConfirmReply, self._config.run.timeout, dict.fromkeys(requests, 0)
        )
        found = {node: reply.clients for node, reply in answers.replies.items()}
        signed = self._by_client(cohorts, answers, found, "confirmed nothing")
        return {
            client: mine.signature
            for client, mine in signed.items()
            if coordinator.is_confirmed(client, mine.signature, dropped)
        }

    def _revealed(
        self,
        coordinator: Coordinator,
        inside: Collection[str],
        dropped: tuple[str, ...],
        confirmed: Mapping[str, str],
    ) -> dict[str, dict[str, str]]:
        """Who revealed → whose → share; the next sum is prepared by who is in it."""
        cohorts, run, name = self._federation.cohorts(list(inside)), self._federation.run, coordinator.setting.name
        following = self._following
        requests = {}
        for node, cohort in cohorts.items():
            orders = tuple(coordinator.unmask_order(client) for client in cohort)
            again = [c for c in cohort if following is not None and c in following.setting.participants]
            plan = following.plan(again) if following is not None and again else None
            requests[node] = UnmaskRequest(run, name, orders, dropped, dict(confirmed), plan)
        answers = self._ask("unmask", requests, UnmaskReply)
        found = {node: reply.clients for node, reply in answers.replies.items()}
        if following is not None:
            ready = {node: reply.prepared for node, reply in answers.replies.items()}
            self._accept(following, self._by_client(cohorts, answers, ready, "prepared nothing").values())
        revealed = self._by_client(cohorts, answers, found, "revealed nothing")
        return {client: mine.shares for client, mine in revealed.items()}

    def _ask(self, kind: str, requests: Mapping[int, object], reply_type: type[R]) -> Answers[R]:
        """Replies, in which no arrays may be."""
        nothing = dict.fromkeys(requests, 0)
        return ask(self._grid, kind, requests, reply_type, self._config.run.timeout, nothing)

    def _by_client(
        self,
        cohorts: Mapping[int, list[str]],
        answers: Answers[PrepareReply] | Answers[ConfirmReply] | Answers[UnmaskReply],
        found: Mapping[int, Iterable[Mine]],
        what: str,
    ) -> dict[str, Mine]:
        """Each asked client's first answer, if it is one; why the others' are none is logged."""
        for node, reason in answers.failed.items():
            logger.warning("%s %s: %s", ", ".join(cohorts[node]), what, reason)
        result: dict[str, Mine] = {}
        for node, replies in found.items():
            for mine in replies:
                if mine.client not in cohorts[node]:
                    continue
                if mine.failure is not None:
                    logger.warning("%s %s: %s", mine.client, what, explained(mine.failure.code))
                else:
                    result.setdefault(mine.client, mine)
        return result
