"""Before the first round: every node says which clients it has, and they declare sizes, privacy plans and ledgers."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence

from flwr.serverapp import Grid

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, PrivacyError, RunFailed, Unwritable
from fedlab.lora.state import State, digest, to_wire
from fedlab.privacy.ledger.ledger import event_of as event_of_line
from fedlab.privacy.ledger.mirror import LedgerMirror
from fedlab.privacy.release import SIZE, event_of
from fedlab.protocol.failures import explained
from fedlab.protocol.fields import RunReference
from fedlab.protocol.messages import DescribeReply, DescribeRequest, Enrolment
from fedlab.run import interrupt
from fedlab.run.directory import RunDirectory
from fedlab.run.places import LOG
from fedlab.seeds import client_order
from strategies.server.exchange import Answers, ask
from strategies.server.federation import NOWHERE, ClientInfo, Federation
from strategies.server.server_data import ServerData

logger = logging.getLogger("fedlab")
AWAIT_SECONDS = 0.5  # between two looks at who is there
WELCOME_SECONDS = 30.0  # to wait for a node that came later; one that does not answer is asked again, ever more rarely
AGAIN_SECONDS = 5.0  # before nodes that could not say who they are are asked again


def run_reference(directory: RunDirectory, config: RunConfig, parts: Sequence[str], basis: State) -> RunReference:
    """What every request of a run says: which run, its configuration's hash, and what stays as it is."""
    configuration = hashlib.sha256(config.to_toml().encode()).hexdigest()
    return RunReference(directory.run_id, configuration, tuple(parts), digest(basis) if basis else "")


class Discovery:
    """Finds out who is there: before the first round, and in a deployment at the beginning of every other.

    Args:
        grid: Flower's.
        directory: of the run; a simulation's nodes find their owners' places in it.
        config: the run's configuration, which travels in what is asked here and nowhere else.
        run: what all later requests name.
        data: what the server holds; says which clients a simulation has, and whether this is one.
        mirror: of the clients' ledgers; None if they keep none.
        basis: what goes along once, for the whole task of a stream.
    """

    def __init__(
        self,
        grid: Grid,
        directory: RunDirectory,
        config: RunConfig,
        run: RunReference,
        data: ServerData,
        mirror: LedgerMirror | None,
        basis: State,
    ) -> None:
        self._grid, self._directory, self._config, self._run = grid, directory, config, run
        self._data, self._mirror, self._basis = data, mirror, basis
        self.absent: dict[int, str] = {}  # node → why nobody of it takes part
        self._looks = 0
        self._ask_at: dict[int, tuple[int, int]] = {}  # silent node → the look that asks it again, and looks left out

    @property
    def retries(self) -> int:
        """Times that a round's missing clients are asked again; never in a simulation, whose nodes are all here."""
        return 0 if self._data.deployment is None else self._data.deployment.retries

    def begin(self, meanwhile: Callable[[], object] = lambda: None) -> Federation:
        """The federation of a run. ``meanwhile`` runs between asking and collecting.

        Raises:
            RunFailed: a node of a simulation fails, no node answers, or two say that they are the same client.
            PrivacyError: noise is seeded, and clients are on machines of their own.
            ConfigError: memorisation is to be measured, and clients are on machines of their own.
        """
        _check_deployable(self._config, self._data)
        deadline = time.monotonic() + self._patience
        nodes = self._await(lambda there: len(there) >= self._config.population, self._config.run.min_clients)
        found = Federation(self._config, {}, {}, nodes, self._run, self._mirror)
        self._enrol(found, nodes, self._config.run.timeout, meanwhile)
        while self._data.deployment is not None and len(found.clients) < self._config.run.min_clients:
            if time.monotonic() >= deadline:
                raise RunFailed(self._too_few(len(found.clients), "take part"))
            interrupt.check()
            time.sleep(AGAIN_SECONDS)
            self.welcome(found)
        self._recall(found)
        found.clients = dict(sorted(found.clients.items(), key=lambda item: client_order(item[0])))
        return found

    def welcome(self, federation: Federation) -> list[str]:
        """Look who is there now; clients that are new, or answer for the first time. Nobody is, in a simulation."""
        if self._data.deployment is None:
            return []
        there = set(self._grid.get_node_ids())
        before = set(federation.clients)
        self._looks += 1
        unknown = there - set(federation.hosts.values())
        if new := sorted(node for node in unknown if self._ask_at.get(node, (0, 0))[0] <= self._looks):
            self._enrol(federation, new, min(WELCOME_SECONDS, self._config.run.timeout))
            for node in [node for node in new if self.absent.get(node, "").startswith("no reply")]:
                pause = 2 * self._ask_at.get(node, (0, 0))[1] or 1
                self._ask_at[node] = (self._looks + 1 + pause, pause)
        federation.nodes = sorted(there)
        federation.offline = {client for client, node in federation.hosts.items() if node not in there}
        return [client for client in federation.clients if client not in before]

    def await_clients(self, federation: Federation, needed: int) -> None:
        """Wait until so many of those who may be drawn are there. Raises RunFailed where they do not come in time."""
        if self._data.deployment is None or not federation.offline:
            return
        hosts = {federation.hosts[client] for client in federation.eligible if client in federation.hosts}
        self._await(lambda there: len(hosts & there) >= needed, None)
        there = set(self._grid.get_node_ids())
        federation.offline = {client for client, node in federation.hosts.items() if node not in there}

    def await_back(self, nodes: set[int]) -> list[int]:
        """Which of these nodes are there, after waiting for all of them for as long as that is set."""
        there = self._await(lambda there: nodes <= there, 0)
        return [node for node in there if node in nodes]

    def _await(self, enough: Callable[[set[int]], bool], least: int | None) -> list[int]:
        """Nodes that are there, as soon as they are enough; at the latest after the time that is set.

        Raises RunFailed if they are fewer than ``least`` then; None: if they are not enough.
        """
        deadline, told = time.monotonic() + self._patience, False
        while True:
            there = set(self._grid.get_node_ids())
            if self._data.deployment is None or enough(there):
                return sorted(there)
            if not told:
                logger.info("waiting for clients: %d nodes are there", len(there))
                told = True
            if time.monotonic() >= deadline:
                break
            interrupt.check()
            time.sleep(AWAIT_SECONDS)
        if least is None or len(there) < least:
            raise RunFailed(self._too_few(len(there), "are connected"))
        return sorted(there)

    @property
    def _patience(self) -> float:
        """Seconds to wait for clients."""
        return 0.0 if self._data.deployment is None else self._data.deployment.wait

    def _too_few(self, count: int, what: str) -> str:
        """What a run ends with that lacks clients: how many there are, why the others are none, and what to do."""
        why = "".join(f"; node {node}: {reason}" for node, reason in list(self.absent.items())[:3])
        return (
            f"{count} clients {what} after {self._patience:.0f} s, and {self._config.run.min_clients} are needed"
            f" (run.min_clients){why}. Start them, or lower it, then continue with: fedlab resume"
            f" {self._directory.path}"
        )

    def _enrol(
        self,
        federation: Federation,
        nodes: Sequence[int],
        timeout: float,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        """Ask nodes who they are, wait so many seconds for their answers, and enter what they declare."""
        text, arrays, clients = self._config.to_toml(), to_wire(self._basis), self._data.clients
        place = str(self._directory.path) if self._data.deployment is None else ""  # no path of the server's leaves it
        requests = {
            node: DescribeRequest(self._run, text, tuple(clients[i :: len(nodes)]), place, arrays)
            for i, node in enumerate(nodes)
        }
        answers = ask(self._grid, "describe", requests, DescribeReply, timeout, meanwhile=meanwhile)
        deployed = self._data.deployment is not None
        absent = _failed(answers, self._directory, deployed)
        for node, reply in answers.replies.items():
            if reply.exclusive != deployed:
                absent[node] = "it is no client's own" if deployed else "it is a client's"
                continue
            for enrolment in reply.clients:
                client = enrolment.reply.client
                if client in federation.clients and not self._same(federation, enrolment):
                    absent[node] = (
                        f"it says that it is {client}, and so does node {federation.hosts[client]}; every client needs"
                        " a name of its own"
                    )
                    continue
                _admit(federation, enrolment)
                if deployed:
                    federation.hosts[client] = node
        for node in nodes:
            if node in absent and absent[node] != self.absent.get(node):  # told once
                logger.warning("node %d takes no part: %s", node, absent[node])
            self.absent.pop(node, None)
        self.absent |= absent
        if self._mirror is not None and len(absent) < len(nodes):
            self._mirror.start(self._config.privacy.unit, self._directory.file_digest("run.toml"))

    def _recall(self, federation: Federation) -> None:
        """Of a deployed run that is resumed: clients that took part before and are not here now are known, and offline.

        They may have been charged since they were heard of last, and come back any time.
        """
        if self._data.deployment is None or self._mirror is None:
            return
        for client in self._mirror.recall():
            if (plan := self._mirror.plan(client)) is None:
                continue
            event, delta = event_of_line(plan["event"]), float.fromhex(plan["delta"])
            federation.clients[client] = ClientInfo(plan["n"], event, delta)
            federation.hosts[client] = NOWHERE
            federation.offline.add(client)
            federation.recalled.append(client)
            logger.warning("%s took part before and is not here; the run goes on without it until it comes", client)

    def _same(self, federation: Federation, enrolment: Enrolment) -> bool:
        """Whether a client that is known speaks from another node, with the key of its ledger; the first to come keeps
        a name, so that nobody can end a run by claiming it.

        Raises RunFailed in a simulation.
        """
        client = enrolment.reply.client
        if client not in federation.hosts:
            raise RunFailed(f"two nodes say that they are {client}; every client needs a name of its own")
        return self._mirror is not None and bool(enrolment.key) and enrolment.key == self._mirror.key_of(client)


def _check_deployable(config: RunConfig, data: ServerData) -> None:
    """Raise PrivacyError or ConfigError for what may not be asked of clients on machines of their own."""
    if data.deployment is None:
        return
    if config.private and config.privacy.noise == "seeded" and not data.deployment.rehearsal:
        raise PrivacyError(
            'privacy.noise = "seeded": whoever knows run.seed can subtract the noise, so it is for simulations only,'
            ' and clients are on machines of their own; set privacy.noise = "secure", or rehearse with --rehearsal,'
            " which protects nobody"
        )
    asked = {"data.canaries": config.data.canaries, "evaluate.membership": config.evaluate.membership}
    if odd := [key for key, value in asked.items() if value is not None]:
        raise ConfigError(
            f"{odd[0]} is for simulations: it looks at single records, and clients are on machines of their own; remove"
            " it"
        )


def _failed(answers: Answers[DescribeReply], directory: RunDirectory, deployed: bool) -> dict[int, str]:
    """Node → why it did not answer. A simulation needs all its nodes; elsewhere those that failed are left out."""
    absent = {node: reason.removeprefix("node failed: ") for node, reason in answers.failed.items()}
    for reason in absent.values() if not deployed else ():
        if "storage:" in reason:
            raise Unwritable(directory.path, "a node could not keep what a run begins with")
        raise RunFailed(f"a node could not prepare the run: {reason} ({directory.path / LOG})")
    return absent


def _admit(federation: Federation, enrolment: Enrolment) -> None:
    """Enter one declaration; a client that refuses, or whose ledger is not what it was, is known but never drawn."""
    reply, mirror = enrolment.reply, federation.mirror
    client, size = reply.client, reply.release(SIZE)
    examples = size.numbers.get("examples", 0) if size is not None else 0
    event = event_of(enrolment.event) if enrolment.event is not None else None
    delta = math.nan if enrolment.delta is None else enrolment.delta
    federation.clients[client] = ClientInfo(int(examples), event, delta)
    problem = explained(reply.failure.code) if reply.failure is not None else ""
    if size is None and problem:
        pass  # it refused before it opened its data
    elif not (examples >= 1 and examples == int(examples)):
        problem = f"it declared {examples:g} examples"
    elif mirror is not None and enrolment.key and reply.lines is not None:
        try:
            mirror.enrol(client, enrolment.key, reply.lines)
        except PrivacyError as error:
            problem = str(error)
    elif mirror is not None and not problem:
        problem = "it declared no ledger"
    key = enrolment.sum_key
    if key is not None and enrolment.key not in ("", key.identity):
        problem = problem or "its key of secure sums is not signed by its ledger's"
    elif key is not None:
        federation.sum_keys[client] = key
    if problem:
        federation.refused[client] = problem
