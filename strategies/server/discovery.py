"""Before the first round: every node says which clients it has, and they declare sizes, privacy plans and ledgers."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence

from flwr.serverapp import Grid

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, PrivacyError, RunFailed, Unwritable
from fedlab.lora.state import State, digest, to_wire
from fedlab.privacy.ledger.mirror import LedgerMirror
from fedlab.privacy.release import SIZE, event_of
from fedlab.protocol.failures import explained
from fedlab.protocol.messages import DescribeReply, DescribeRequest, Enrolment, RunReference
from fedlab.run.directory import RunDirectory
from fedlab.run.places import LOG
from fedlab.seeds import client_order
from strategies.server.exchange import Answers, ask
from strategies.server.federation import ClientInfo, Federation

logger = logging.getLogger("fedlab")


def run_reference(directory: RunDirectory, config: RunConfig, parts: Sequence[str], basis: State) -> RunReference:
    """What every request of a run says: which run, its configuration's hash, and what stays as it is."""
    configuration = hashlib.sha256(config.to_toml().encode()).hexdigest()
    return RunReference(directory.run_id, configuration, tuple(parts), digest(basis) if basis else "")


def discover(
    grid: Grid,
    directory: RunDirectory,
    config: RunConfig,
    run: RunReference,
    clients: Sequence[str],
    mirror: LedgerMirror | None,
    basis: State,
    meanwhile: Callable[[], object] = lambda: None,
) -> Federation:
    """The federation of a run.

    Args:
        grid: Flower's.
        directory: of the run; a simulation's nodes find their owners' places in it.
        config: the run's configuration, which travels here and nowhere else.
        run: what all later requests name.
        clients: of a simulation.
        mirror: of the clients' ledgers; None if they keep none.
        basis: what goes along once, for the whole task of a stream.
        meanwhile: runs between asking and collecting.

    Raises:
        RunFailed: a node of a simulation fails, no node answers, or two say that they are the same client.
        PrivacyError: noise is seeded, and clients are on machines of their own.
        ConfigError: memorisation is to be measured, and clients are on machines of their own.
    """
    nodes = sorted(grid.get_node_ids())
    text, arrays = config.to_toml(), to_wire(basis)
    requests = {
        node: DescribeRequest(run, text, tuple(clients[i :: len(nodes)]), str(directory.path), arrays)
        for i, node in enumerate(nodes)
    }
    found = Federation(config, {}, {}, nodes, run, mirror)
    answers = ask(grid, "describe", requests, DescribeReply, config.run.timeout, meanwhile=meanwhile)
    _check_failed(answers, directory)
    for node, reply in answers.replies.items():
        for enrolment in reply.clients:
            _admit(found, enrolment)
            if reply.exclusive:
                found.hosts[enrolment.reply.client] = node
    if found.hosts and config.private and config.privacy.noise == "seeded":
        raise PrivacyError(
            'privacy.noise = "seeded": whoever knows run.seed can subtract the noise, so it is for simulations only,'
            f' and {next(iter(found.hosts))} is on a machine of its own; set privacy.noise = "secure"'
        )
    asked = {"data.canaries": config.data.canaries, "evaluate.membership": config.evaluate.membership}
    if found.hosts and (odd := [key for key, value in asked.items() if value is not None]):
        raise ConfigError(
            f"{odd[0]} is for simulations: it looks at single records, and those of {next(iter(found.hosts))} are on a"
            " machine of its own; remove it"
        )
    found.clients = dict(sorted(found.clients.items(), key=lambda item: client_order(item[0])))
    if mirror is not None:
        mirror.start(config.privacy.unit, directory.file_digest("run.toml"))
    return found


def _check_failed(answers: Answers[DescribeReply], directory: RunDirectory) -> None:
    """A simulation needs all its nodes; elsewhere those that failed are left out, and named in the log."""
    deployed = any(reply.exclusive for reply in answers.replies.values())
    for node, reason in answers.failed.items():
        reason = reason.removeprefix("node failed: ")
        if not deployed and "storage:" in reason:
            raise Unwritable(directory.path, "a node could not keep what a run begins with")
        if not deployed:
            raise RunFailed(f"a node could not prepare the run: {reason} ({directory.path / LOG})")
        logger.warning("node %d takes no part: %s", node, reason)


def _admit(federation: Federation, enrolment: Enrolment) -> None:
    """Enter one declaration; a client that refuses, or whose ledger is not what it was, is known but never drawn."""
    reply, mirror = enrolment.reply, federation.mirror
    client, size = reply.client, reply.release(SIZE)
    if client in federation.clients:
        raise RunFailed(f"two nodes say that they are {client}; every client needs a name of its own")
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
    if problem:
        federation.refused[client] = problem
