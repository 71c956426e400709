"""Ask the clients, at a task's end, what inputs the task used: one sum over all, noised or masked, never one in the clear."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from torch import Tensor

from fedlab.continual.observed import input_groups
from fedlab.continual.sketch import from_fixed
from fedlab.errors import FedlabError, RunFailed
from fedlab.privacy.masking import add
from strategies.exchange import exchange
from strategies.records import to_record

if TYPE_CHECKING:
    from strategies.loop import Rounds

logger = logging.getLogger("fedlab")


def collect_grams(rounds: Rounds) -> dict[str, Tensor]:
    """module → Σ over clients of the Gram matrices of its inputs.

    Under DP, and where sums may be seen in the clear, whoever fails is left out and named. A masked sum that lacks somebody is noise: it
    is asked for again from those who answered. Raises RunFailed if too few are left.
    """
    settings = rounds.config.gram
    assert settings is not None
    rounds.progress.note("learning which inputs the task used")
    clients = [client for client in rounds.federation.clients if client not in rounds.federation.refused]
    hidden = not rounds.config.private and not settings.clear
    least = settings.cohort if hidden else 1
    for attempt in range(3):
        keys = _keys(rounds, clients) if hidden else {}
        asked = [client for client in clients if client in keys] if hidden else clients
        if len(asked) < least:
            break
        total, given = _ask(rounds, asked, keys, attempt)
        if len(given) >= least and (not hidden or set(given) == set(asked)):
            sums = from_fixed(total)
            return {module: sums[leader] for module, leader in input_groups(rounds.session.model).items()}
        clients = given
    raise RunFailed(f"{len(clients)} clients released what inputs they used, at least {least} are needed; see the log for what failed")


def _keys(rounds: Rounds, clients: list[str]) -> dict[str, str]:
    """client → fresh public key, of those who answer."""
    cohorts = rounds.federation.cohorts(clients)
    messages = [
        Message(RecordDict({"round": rounds.federation.order.record(rounds.config, cohort)}), node, f"{MessageType.QUERY}.keys")
        for node, cohort in cohorts.items()
    ]
    found: dict[str, str] = {}
    for reply in exchange(rounds.grid, messages, rounds.config.run.timeout):
        if not reply.has_error():
            record = reply.content.config_records["keys"]
            own = dict(zip(cast(list[str], record["ids"]), cast(list[str], record["public"]), strict=True))
            found |= {client: key for client, key in own.items() if client in cohorts.get(reply.metadata.src_node_id, [])}
    return found


def _ask(rounds: Rounds, clients: list[str], keys: Mapping[str, str], attempt: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """The sum in fixed point, and who is in it."""
    federation, config = rounds.federation, rounds.config
    cohorts = federation.cohorts(clients)
    state = to_record(rounds.strategy.travelling(rounds.state), "float32")
    peers = {"peers": list(keys), "public": list(keys.values()), "attempt": attempt, "wire_dtype": "float32"}
    messages = []
    for node, cohort in cohorts.items():
        known = [federation.book.known(client) if federation.book else 0 for client in cohort]
        order = federation.order.record(config, cohort, known=known, **peers)
        messages.append(Message(RecordDict({"state": state, "round": order}), node, f"{MessageType.QUERY}.gram"))
    total: dict[str, np.ndarray] = {}
    given: list[str] = []
    for reply in exchange(rounds.grid, messages, config.run.timeout):
        cohort = cohorts.pop(reply.metadata.src_node_id, [])
        if reply.has_error():
            logger.warning("%s gave no Gram matrices: node failed: %s", ", ".join(cohort), reply.error.reason)
            continue
        try:
            mine = _lines(rounds, cohort, reply.content)
            total = add(total, _sums(reply.content.array_records["grams"], total))
            given += mine
        except (KeyError, TypeError, ValueError, FedlabError) as error:
            logger.warning("%s gave no Gram matrices: %s: %s", ", ".join(cohort), type(error).__name__, error)
    rounds.accounts.see(given)
    return total, given


def _lines(rounds: Rounds, cohort: list[str], content: RecordDict) -> list[str]:
    """Enter the ledgers' new lines; returns the clients whose matrices are in the node's sum."""
    charges, failures = content.config_records["charges"], content.config_records["failures"]
    for client, text in zip(cast(list[str], charges["ids"]), cast(list[str], charges["lines"]), strict=True):
        if client in cohort and rounds.federation.book is not None:
            rounds.federation.book.accept(client, text)
    for client, reason in zip(cast(list[str], failures["ids"]), cast(list[str], failures["reasons"]), strict=True):
        logger.warning("%s gave no Gram matrices: %s", client, reason)
    return [client for client in cast(list[str], content.config_records["clients"]["ids"]) if client in cohort]


def _sums(record: ArrayRecord, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A node's sum, checked. Raises ValueError for what cannot be added to the others'."""
    values = {name: array.numpy() for name, array in record.items()}
    for name, value in values.items():
        if value.dtype != np.int64 or value.ndim != 2 or value.shape[0] != value.shape[1]:
            raise ValueError(f"the Gram matrix of {name} came as {value.dtype} {value.shape}")
    if like and {n: v.shape for n, v in like.items()} != {n: v.shape for n, v in values.items()}:
        raise ValueError("it released other matrices than the others")
    return values
