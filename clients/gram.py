"""The release at a task's end: what inputs the task used, as a sum of clipped Gram matrices over clients.

Under example-level DP each client's matrices are charged and noised before they leave it. Otherwise they leave it
masked, so that the server sees nothing but the sum over all clients (``fedlab.privacy.secure_sum``), unless
``strategy.gram.clear`` says that it may.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from clients.account import ClientAccount, digest_of, release_run
from clients.node import Node
from clients.owner import Owner
from clients.pending import Asked, PendingRelease, Releases, failure_of
from clients.secure_sum import hide
from fedlab.config.tasks import Gram
from fedlab.continual.input_grams import input_grams, input_groups
from fedlab.continual.sketch import to_fixed
from fedlab.errors import PrivacyError
from fedlab.lora.state import digest, from_wire
from fedlab.privacy.gram_plan import GramPlan
from fedlab.privacy.ledger.terms import scope_of
from fedlab.privacy.release import GRAM
from fedlab.privacy.secure_sum.masking import add
from fedlab.protocol import ProtocolError
from fedlab.protocol.messages import ClientOrder, ClientReply, GramReply, GramRequest, Release
from fedlab.seeds import random_stream
from fedlab.session import Session


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
        raise ProtocolError("gram", "this configuration has no release at a task's end")
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
    pending, account = PendingRelease(GRAM, owner.guarded), None
    released: Releases = ()
    try:
        if owner.guarded:
            account = ClientAccount(task.session, owner, task.request.run)
        released = _release(task, owner, account, pending)
    except Exception as error:
        pending.fail(error)
        owner.note(error, "no Gram matrices")
    reply = ClientReply(owner.client, failure=pending.failure)
    if account is not None:
        reply = _with_lines(reply, account, owner, order)
    return reply, released[0] if released and reply.failure is None else None


def _with_lines(reply: ClientReply, account: ClientAccount, owner: Owner, order: ClientOrder) -> ClientReply:
    try:
        return replace(reply, lines=account.lines_after(order.known))
    except PrivacyError as error:
        owner.note(error, "its ledger")
        return replace(reply, failure=reply.failure or failure_of(error))


def _release(task: _Task, owner: Owner, account: ClientAccount | None, pending: PendingRelease) -> Releases:
    """Charge, compute and commit; or what a repeat gets."""
    plan = None
    if account is not None:
        plan = _plan(task, account)
        if (again := pending.charge(account, _asked(task, account, plan))) is not None:
            return again
    values = _matrices(task, owner, plan)
    return pending.commit(1, values, {name: torch.from_numpy(value) for name, value in values.items()})


def _plan(task: _Task, account: ClientAccount) -> GramPlan:
    return GramPlan(task.settings, account.plan.n, account.plan.delta, account.plan.noise)


def _asked(task: _Task, account: ClientAccount, plan: GramPlan) -> Asked:
    """Sign the release's plan, in a run of its own in the same ledger; what it is charged under."""
    shapes = task.session.shapes
    widths = {name: shapes[f"{name}.lora_A"][1] for name in sorted(set(task.groups.values()))}
    terms = {**account.terms, **plan.terms(), "scope": scope_of({name: (n, n) for name, n in widths.items()})}
    guard = account.beside(release_run(account.guard.run, GRAM))
    if refusal := guard.plan(terms, {}):
        raise refusal
    asked = digest_of(task.request.run.configuration, task.received, task.request.run.basis)
    return Asked(guard, terms, plan.event(), 1, task.received, asked)


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
    if request.sum is None:
        raise ProtocolError("sum", "is missing: without DP nothing leaves that is not masked (strategy.gram.clear)")
    return hide(owner, values, request.run.run, ("gram", 0), request.sum)
