"""The release at a task's end: what inputs the task used, as a sum of clipped Gram matrices over clients.

Under example-level DP each client's matrices are charged and noised before they leave it. Otherwise they leave it
masked, so that the server sees nothing but the sum over all clients (``fedlab.privacy.secure_sum``), unless
``strategy.gram.clear`` says that it may.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from clients.account import ClientAccount
from clients.node import Node
from clients.owner import Owner
from clients.pending import PendingRelease
from clients.sum_keys import hide
from clients.train import EXPECTED
from fedlab.config.tasks import Gram
from fedlab.continual.input_grams import input_grams, input_groups
from fedlab.continual.sketch import to_fixed
from fedlab.errors import PrivacyError
from fedlab.lora.state import digest, from_wire
from fedlab.privacy.gram_plan import GramPlan
from fedlab.privacy.ledger.guard import Guard
from fedlab.privacy.ledger.terms import scope_of
from fedlab.privacy.release import GRAM
from fedlab.privacy.secure_sum.masking import add
from fedlab.protocol.messages import ClientOrder, ClientReply, GramReply, GramRequest, Release
from fedlab.seeds import random_stream
from fedlab.session import Session

logger = logging.getLogger("fedlab")


@dataclass(frozen=True)
class _Task:
    """What all clients of one request have in common."""

    session: Session
    request: GramRequest
    settings: Gram
    groups: dict[str, str]  # module → the first that is fed the same tensor
    received: str  # digest of the state


def answer_gram(node: Node, request: GramRequest) -> GramReply:
    """The sum over the clients in fixed point, which clients are in it, ledger lines and failures."""
    started, session = time.time(), node.session
    settings = session.config.gram
    if settings is None:
        raise PrivacyError("this configuration has no release at a task's end")
    received = from_wire(request.state)
    session.model.load(received | session.basis)
    task = _Task(session, request, settings, input_groups(session.model), digest(received))
    total: dict[str, np.ndarray] = {}
    replies, released = [], None
    for order in request.clients:
        reply, own = _answer(task, node.owners.one(order.client), order)
        replies.append(reply)
        if own is not None:
            total, released = add(total, own.arrays), own
    whole = Release(GRAM, total, event=released.event) if released is not None else None
    return GramReply(started, time.time(), tuple(replies), whole)


def _answer(task: _Task, owner: Owner, order: ClientOrder) -> tuple[ClientReply, Release | None]:
    """One client's reply, and its matrices or None."""
    private = task.session.config.private
    pending = PendingRelease(GRAM, guarded=private)
    account, plan, own = None, None, None
    try:
        if private:
            account = ClientAccount(task.session, owner, task.request.run.run, task.request.run.parts)
            plan = _charge(task, account, pending)
        values = _matrices(task, owner, plan)
        own = pending.commit(1, values, {name: torch.from_numpy(value) for name, value in values.items()})
    except EXPECTED as error:
        logger.warning("%s gave no Gram matrices: %s", owner.client, error)
        pending.fail(error)
    lines = account.lines_after(order.known) if account else None
    return ClientReply(owner.client, lines=lines, failure=pending.failure), own


def _charge(task: _Task, account: ClientAccount, pending: PendingRelease) -> GramPlan:
    """Sign the release's plan and charge it, in a run of its own in the same ledger."""
    shapes = task.session.shapes
    widths = {name: shapes[f"{name}.lora_A"][1] for name in sorted(set(task.groups.values()))}
    plan = GramPlan(task.settings, account.plan.n, account.plan.delta, account.plan.noise)
    terms = {**account.terms, **plan.terms(), "scope": scope_of({name: (n, n) for name, n in widths.items()})}
    guard = Guard(account.guard.ledger, release_run(account.guard.run))
    if refusal := guard.plan(terms, {}):
        raise refusal
    pending.charge(guard, terms, plan.event(), 1, task.received)
    return plan


def _matrices(task: _Task, owner: Owner, plan: GramPlan | None) -> dict[str, np.ndarray]:
    """What leaves the client, in fixed point: noised under DP, else masked, or clear if the configuration says so."""
    session, settings, client = task.session, task.settings, owner.client
    size = session.config.train.physical_batch
    grams = input_grams(session.model, session.data, session.data.train(client), task.groups, settings.clip, size)
    if plan is not None:
        draws = random_stream(session.config.sampling_seed, "noise", client, "gram")
        return to_fixed(plan.privatise(grams, draws))
    request = task.request
    values = to_fixed(grams)
    if settings.clear:
        return values
    return hide(owner, values, request.run.run, request.attempt, request.keys, settings.min_clients)


def release_run(run: str) -> str:
    """The release's name in a ledger: a run of its own, of one round, named after the run that it belongs to."""
    return hashlib.sha256(f"{run}|gram".encode()).hexdigest()[:32]
