"""Ask the clients, at a task's end, what inputs the task used: one sum over all, noised or masked, never one in the
clear.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.serverapp import Grid
from safetensors.torch import load_file
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.tasks import Gram
from fedlab.continual.input_grams import input_groups
from fedlab.continual.sketch import from_fixed
from fedlab.errors import RunFailed
from fedlab.lora.state import State, nbytes, to_wire, write_state
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.gram_plan import gram_event
from fedlab.privacy.release import GRAM
from fedlab.privacy.secure_sum.masking import add
from fedlab.protocol import ProtocolError
from fedlab.protocol.checks import check_arrays, wire_bytes
from fedlab.protocol.failures import explained
from fedlab.protocol.messages import ClientOrder, GramReply, GramRequest
from strategies.server.accounts import Accounts
from strategies.server.exchange import ask
from strategies.server.federation import Federation
from strategies.server.secure_sum import SecureSum

logger = logging.getLogger("fedlab")
ATTEMPTS = 3  # at a masked sum, each of those clients that gave nothing yet
RELEASED = "released.safetensors"  # the sums that were released at a task's end, and what they cost to send
TRAFFIC = ("bytes_up", "bytes_down")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class GramRelease:
    """What the release at a task's end needs of the run.

    Attributes:
        grid: carries the messages.
        config: of the run.
        settings: noise, clip, and how few clients a sum may be of.
        federation: who is there.
        accounts: what the release costs whom.
        travelling: the state that clients look at their inputs with.
    """

    grid: Grid
    config: RunConfig
    settings: Gram
    federation: Federation
    accounts: Accounts
    travelling: State


def collect_grams(
    release: GramRelease, directory: Path, model: LoadedModel
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """module → Σ over clients of the Gram matrices of its inputs; and the bytes that it cost.

    Kept in the run's ``directory``: released once, also if the run is cut off.

    Whoever fails is left out and named. Of a masked sum too (``SecureSum``), but it is made once: two sums would show
    by their difference who is in one of them alone. Raises RunFailed if too few are left, or it cannot be unmasked.
    """
    kept, groups = directory / RELEASED, input_groups(model)
    if not kept.is_file():
        traffic = dict.fromkeys(TRAFFIC, 0)
        sums = _collect(release, _shapes(model, groups.values()), traffic)
        write_state(kept, sums | {name: torch.tensor(value) for name, value in traffic.items()})
    found: dict[str, Tensor] = load_file(str(kept))
    traffic = {name: int(found.pop(name)) for name in TRAFFIC}
    return {module: found[leader] for module, leader in groups.items()}, traffic


def _collect(release: GramRelease, shapes: Shapes, traffic: dict[str, int]) -> dict[str, Tensor]:
    """First module of a group that shares its input → the sum."""
    settings, federation = release.settings, release.federation
    clients = [client for client in federation.clients if client not in federation.refused]
    hidden = not release.config.private and not settings.clear
    sums = SecureSum(release.grid, release.config, federation) if hidden else None
    clients = sums.prepare("gram", 0, clients) if sums is not None else clients
    total, given = dict[str, np.ndarray](), list[str]()
    for _ in range(ATTEMPTS if sums is not None else 1):  # what a client masked once it masks again, to the bit
        missing = [client for client in clients if client not in given]
        values, more = _ask(release, shapes, missing, sums, traffic) if missing else ({}, [])
        total, given = add(total, values), given + more
    if sums is None and given:
        return from_fixed(total)
    found = sums.unmask(total, given) if sums is not None and clients else None
    if found is not None:
        return from_fixed(found)
    hint = "; resume when they are back, or set strategy.gram.clear" if hidden else ""
    raise RunFailed(
        f"{len(given)} clients released what inputs they used, at least {settings.min_clients if hidden else 1} must,"
        f" and more than half of those that were asked; see the log for what failed{hint}"
    )


def _ask(
    release: GramRelease,
    shapes: Shapes,
    clients: list[str],
    sums: SecureSum | None,
    traffic: dict[str, int],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The sum in fixed point, and who is in it. Whoever is asked counts as charged until its ledger is seen."""
    federation, config, travelling = release.federation, release.config, release.travelling
    cohorts = federation.cohorts(clients)
    traffic["bytes_down"] += len(clients) * nbytes(travelling)
    if config.private:
        release.accounts.expect(clients, gram_event(release.settings))
    arrays, total, given = to_wire(travelling), dict[str, np.ndarray](), list[str]()
    requests = {
        node: GramRequest(
            federation.run,
            tuple(ClientOrder(client, federation.known(client), 1) for client in cohort),
            sums.order(cohort) if sums is not None else None,
            arrays,
        )
        for node, cohort in cohorts.items()
    }
    most = dict.fromkeys(requests, wire_bytes(shapes, "int64"))
    answers = ask(release.grid, "gram", requests, GramReply, config.run.timeout, most)
    for node, reason in answers.failed.items():
        logger.warning("%s gave no Gram matrices: %s", ", ".join(cohorts[node]), reason)
    for node, reply in answers.replies.items():
        mine = _members(release, cohorts[node], reply)
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


def _shapes(model: LoadedModel, leaders: Iterable[str]) -> Shapes:
    """What comes back: the upper triangle [n(n+1)/2] of each distinct input's Gram matrix."""
    widths = {leader: model.parameters[f"{leader}.lora_A"].shape[1] for leader in leaders}
    return {leader: (n * (n + 1) // 2,) for leader, n in widths.items()}


def _members(release: GramRelease, cohort: list[str], reply: GramReply) -> list[str]:
    """Enter the ledgers' new lines; returns the clients whose matrices are in the node's sum."""
    inside, problems = [], dict[str, str]()
    for mine in reply.clients:
        if mine.client not in cohort:
            continue
        if mine.failure is not None:
            problems[mine.client] = explained(mine.failure.code)
        elif mine.client not in problems:
            inside.append(mine.client)
        if release.federation.take_lines(mine, problems):
            release.accounts.see([mine.client])
    for client, reason in problems.items():
        logger.warning("%s gave no Gram matrices: %s", client, reason)
    unproven = [client for client in inside if client in problems]
    return [] if unproven else inside  # a sum cannot be rid of one of its terms
