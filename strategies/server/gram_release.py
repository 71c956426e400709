"""Ask the clients, at a task's end, what inputs the task used: one sum over all, noised or masked, never one in the
clear.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlab.continual.input_grams import input_groups
from fedlab.continual.sketch import from_fixed
from fedlab.errors import RunFailed
from fedlab.lora.state import nbytes, to_wire, write_state
from fedlab.privacy.gram_plan import gram_event
from fedlab.privacy.release import GRAM
from fedlab.privacy.secure_sum.masking import add
from fedlab.protocol import ProtocolError
from fedlab.protocol.checks import check_arrays, wire_bytes
from fedlab.protocol.messages import ClientOrder, GramReply, GramRequest, KeysReply, KeysRequest
from strategies.server.exchange import ask
from strategies.server.loop import Rounds

logger = logging.getLogger("fedlab")
RELEASED = "released.safetensors"  # the sums that were released at a task's end, and what they cost to send
TRAFFIC = ("bytes_up", "bytes_down")
ATTEMPTS = 3  # at a masked sum


def collect_grams(rounds: Rounds) -> dict[str, Tensor]:
    """module → Σ over clients of the Gram matrices of its inputs. Kept with the run: released once, also if the run is
    cut off.

    Under DP, and where sums may be seen in the clear, whoever fails is left out and named. A masked sum that lacks
    somebody is noise: it is asked for again, from the same clients, since the difference of two sums would show who is
    in one of them alone. Raises RunFailed if too few are left, or a masked sum cannot be completed.
    """
    kept = rounds.directory.path / RELEASED
    if not kept.is_file():
        traffic = dict.fromkeys(TRAFFIC, 0)
        sums = _collect(rounds, traffic)
        write_state(kept, sums | {name: torch.tensor(value) for name, value in traffic.items()})
    found: dict[str, Tensor] = load_file(str(kept))
    for name in TRAFFIC:
        rounds.totals[name] += int(found.pop(name))
    return {module: found[leader] for module, leader in input_groups(rounds.session.model).items()}


def _collect(rounds: Rounds, traffic: dict[str, int]) -> dict[str, Tensor]:
    """First module of a group that shares its input → the sum."""
    settings = rounds.config.gram
    assert settings is not None
    rounds.progress.note("learning which inputs the task used")
    clients = [client for client in rounds.federation.clients if client not in rounds.federation.refused]
    hidden = not rounds.config.private and not settings.clear
    least = settings.min_clients if hidden else 1
    for attempt in range(ATTEMPTS if hidden else 1):
        keys = _keys(rounds, clients) if hidden else {}
        if hidden and attempt == 0:  # who has no key was in no sum yet and may stay out
            clients = [client for client in clients if client in keys]
        if len(clients) < least or (hidden and len(keys) < len(clients)):
            break
        total, given = _ask(rounds, clients, keys, attempt, traffic)
        if len(given) >= least and (not hidden or set(given) == set(clients)):
            return from_fixed(total)
        if not hidden:
            clients = given
    hint = (
        "; a masked sum needs all clients of its first try: resume when they are back, or set strategy.gram.clear"
        if hidden
        else ""
    )
    raise RunFailed(
        f"{len(clients)} clients were to release what inputs they used, at least {least} must; see the log for what"
        f" failed{hint}"
    )


def _keys(rounds: Rounds, clients: list[str]) -> dict[str, str]:
    """client → fresh public key, of those who answer."""
    cohorts = rounds.federation.cohorts(clients)
    requests = {node: KeysRequest(rounds.federation.run, tuple(cohort)) for node, cohort in cohorts.items()}
    answers = ask(rounds.grid, "keys", requests, KeysReply, rounds.config.run.timeout)
    return {
        client: key
        for node, reply in answers.replies.items()
        for client, key in reply.keys.items()
        if client in cohorts[node]
    }


def _ask(
    rounds: Rounds, clients: list[str], keys: Mapping[str, str], attempt: int, traffic: dict[str, int]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The sum in fixed point, and who is in it. Whoever is asked counts as charged until its ledger is seen."""
    federation, config, settings = rounds.federation, rounds.config, rounds.config.gram
    assert settings is not None
    cohorts = federation.cohorts(clients)
    travelling = rounds.strategy.travelling(rounds.state)
    traffic["bytes_down"] += len(clients) * nbytes(travelling)
    if config.private:
        rounds.accounts.expect(clients, gram_event(settings))
    arrays, total, given = to_wire(travelling), dict[str, np.ndarray](), list[str]()
    requests = {
        node: GramRequest(
            federation.run,
            tuple(ClientOrder(client, federation.known(client), 1) for client in cohort),
            dict(keys),
            attempt,
            arrays,
        )
        for node, cohort in cohorts.items()
    }
    shapes = _shapes(rounds)
    most = dict.fromkeys(requests, wire_bytes(shapes, "int64"))
    answers = ask(rounds.grid, "gram", requests, GramReply, config.run.timeout, most)
    for node, reason in answers.failed.items():
        logger.warning("%s gave no Gram matrices: %s", ", ".join(cohorts[node]), reason)
    for node, reply in answers.replies.items():
        mine = _members(rounds, cohorts[node], reply)
        if not mine:
            continue
        try:
            if reply.sum is None:
                raise ProtocolError(GRAM, "is missing")
            check_arrays(reply.sum, shapes, "int64", "")
        except ProtocolError as error:
            logger.warning("%s gave no Gram matrices: %s", ", ".join(cohorts[node]), error)
            continue
        total = add(total, reply.sum.arrays)
        given += mine
        traffic["bytes_up"] += len(mine) * sum(value.nbytes for value in reply.sum.arrays.values())
    return total, given


def _shapes(rounds: Rounds) -> dict[str, tuple[int, ...]]:
    """What comes back: the upper triangle [n(n+1)/2] of each distinct input's Gram matrix."""
    widths = {
        leader: rounds.state[f"{leader}.lora_A"].shape[1] for leader in input_groups(rounds.session.model).values()
    }
    return {leader: (n * (n + 1) // 2,) for leader, n in widths.items()}


def _members(rounds: Rounds, cohort: list[str], reply: GramReply) -> list[str]:
    """Enter the ledgers' new lines; returns the clients whose matrices are in the node's sum."""
    inside, problems = [], dict[str, str]()
    for mine in reply.clients:
        if mine.client not in cohort:
            continue
        if mine.failure is not None:
            problems[mine.client] = mine.failure.reason
        elif mine.client not in problems:
            inside.append(mine.client)
        if rounds.messenger.take_lines(mine.client, mine, problems):
            rounds.accounts.see([mine.client])
    for client, reason in problems.items():
        logger.warning("%s gave no Gram matrices: %s", client, reason)
    unproven = [client for client in inside if client in problems]
    return [] if unproven else inside  # a sum cannot be rid of one of its terms
