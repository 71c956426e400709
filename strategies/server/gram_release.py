"""Ask the clients, at a task's end, what inputs the task used: one sum over all, noised or masked, never one in the
clear.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from safetensors.torch import load_file
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.tasks import Gram
from fedlab.continual.input_grams import input_groups
from fedlab.continual.sketch import from_fixed, side
from fedlab.errors import FedlabError, RunFailed
from fedlab.lora.state import State, nbytes, write_state
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.accounting import Event
from fedlab.privacy.secure_sum.masking import add
from strategies.server.accounts import Accounts
from strategies.server.exchange import exchange
from strategies.server.federation import Federation
from strategies.server.records import to_record

logger = logging.getLogger("fedlab")
RELEASED = "released.safetensors"  # the sums that were released at a task's end, and what they cost to send
TRAFFIC = ("bytes_up", "bytes_down")
ATTEMPTS = 3  # at a masked sum


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

    Under DP, and where sums may be seen in the clear, whoever fails is left out and named. A masked sum that lacks
    somebody is noise: it is asked for again, from the same clients, since the difference of two sums would show who is
    in one of them alone. Raises RunFailed if too few are left, or a masked sum cannot be completed.
    """
    kept = directory / RELEASED
    if not kept.is_file():
        traffic = dict.fromkeys(TRAFFIC, 0)
        sums = _collect(release, traffic)
        write_state(kept, sums | {name: torch.tensor(value) for name, value in traffic.items()})
    found: dict[str, Tensor] = load_file(str(kept))
    traffic = {name: int(found.pop(name)) for name in TRAFFIC}
    return {module: found[leader] for module, leader in input_groups(model).items()}, traffic


def _collect(release: GramRelease, traffic: dict[str, int]) -> dict[str, Tensor]:
    """First module of a group that shares its input → the sum."""
    settings, federation = release.settings, release.federation
    clients = [client for client in federation.clients if client not in federation.refused]
    hidden = not release.config.private and not settings.clear
    least = settings.min_clients if hidden else 1
    for attempt in range(ATTEMPTS if hidden else 1):
        keys = _keys(release, clients) if hidden else {}
        if hidden and attempt == 0:  # who has no key was in no sum yet and may stay out
            clients = [client for client in clients if client in keys]
        if len(clients) < least or (hidden and len(keys) < len(clients)):
            break
        total, given = _ask(release, clients, keys, attempt, traffic)
        if len(given) >= least and (not hidden or set(given) == set(clients)):
            return from_fixed(total)
        if not hidden:
            clients = given
    hint = "; a masked sum needs all clients of its first try: resume when they are back, or set strategy.gram.clear"
    raise RunFailed(
        f"{len(clients)} clients were to release what inputs they used, at least {least} must; see the log for what"
        f" failed{hint if hidden else ''}"
    )


def _keys(release: GramRelease, clients: list[str]) -> dict[str, str]:
    """client → fresh public key, of those who answer."""
    cohorts = release.federation.cohorts(clients)
    messages = [
        Message(
            RecordDict({"round": release.federation.order.record(release.config, cohort)}),
            node,
            f"{MessageType.QUERY}.keys",
        )
        for node, cohort in cohorts.items()
    ]
    found: dict[str, str] = {}
    for reply in exchange(release.grid, messages, release.config.run.timeout):
        if not reply.has_error():
            record = reply.content.config_records["keys"]
            own = dict(zip(cast(list[str], record["ids"]), cast(list[str], record["public"]), strict=True))
            found |= {
                client: key for client, key in own.items() if client in cohorts.get(reply.metadata.src_node_id, [])
            }
    return found


def _ask(
    release: GramRelease, clients: list[str], keys: Mapping[str, str], attempt: int, traffic: dict[str, int]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The sum in fixed point, and who is in it. Whoever is asked counts as charged until its ledger is seen."""
    federation, config = release.federation, release.config
    cohorts = federation.cohorts(clients)
    state = to_record(release.travelling, "float32")
    traffic["bytes_down"] += len(clients) * nbytes(release.travelling)
    if config.private:
        release.accounts.expect(clients, Event("full", 1.0, release.settings.sigma, 1))
    peers = {"peers": list(keys), "public": list(keys.values()), "attempt": attempt, "wire_dtype": "float32"}
    messages = []
    for node, cohort in cohorts.items():
        known = [federation.mirror.known(client) if federation.mirror else 0 for client in cohort]
        order = federation.order.record(config, cohort, known=known, **peers)
        messages.append(Message(RecordDict({"state": state, "round": order}), node, f"{MessageType.QUERY}.gram"))
    total: dict[str, np.ndarray] = {}
    given: list[str] = []
    for reply in exchange(release.grid, messages, config.run.timeout):
        cohort = cohorts.pop(reply.metadata.src_node_id, [])
        if reply.has_error():
            logger.warning("%s gave no Gram matrices: node failed: %s", ", ".join(cohort), reply.error.reason)
            continue
        try:
            mine = _lines(release, cohort, reply.content)
            sums = _sums(reply.content.array_records["grams"], total)
            total = add(total, sums)
            given += mine
            traffic["bytes_up"] += len(mine) * sum(value.nbytes for value in sums.values())
        except (KeyError, TypeError, ValueError, FedlabError) as error:
            logger.warning("%s gave no Gram matrices: %s: %s", ", ".join(cohort), type(error).__name__, error)
    return total, given


def _lines(release: GramRelease, cohort: list[str], content: RecordDict) -> list[str]:
    """Enter the ledgers' new lines; returns the clients whose matrices are in the node's sum."""
    charges, failures = content.config_records["charges"], content.config_records["failures"]
    for client, text in zip(cast(list[str], charges["ids"]), cast(list[str], charges["lines"]), strict=True):
        if client in cohort and release.federation.mirror is not None:
            release.federation.mirror.accept(client, text)
            release.accounts.see([client])
    for client, reason in zip(cast(list[str], failures["ids"]), cast(list[str], failures["reasons"]), strict=True):
        logger.warning("%s gave no Gram matrices: %s", client, reason)
    return [client for client in cast(list[str], content.config_records["clients"]["ids"]) if client in cohort]


def _sums(record: ArrayRecord, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A node's sum, checked. Raises ValueError for what cannot be added to the others'."""
    values = {name: array.numpy() for name, array in record.items()}
    for name, value in values.items():
        if value.dtype != np.int64 or value.ndim != 1:
            raise ValueError(f"the Gram matrix of {name} came as {value.dtype} {value.shape}")
        side(len(value))
    if like and {n: v.shape for n, v in like.items()} != {n: v.shape for n, v in values.items()}:
        raise ValueError("it released other matrices than the others")
    return values
