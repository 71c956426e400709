"""One request of evaluation: the global model, with what a client keeps of it, on each client's held-out examples.

The scores leave as they are where the run shares them, or once, with noise, charged to the client's ledger
(``privacy.scores_sigma``).
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from clients.account import ClientAccount, digest_of, release_run
from clients.node import Node
from clients.owner import Owner
from clients.pending import Asked, PendingRelease, Releases, failure_of
from fedlab.evaluate import evaluate, primary_score
from fedlab.lora.state import State, digest, from_wire
from fedlab.privacy.ledger.terms import scope_of
from fedlab.privacy.release import NOISED_SCORES, SCORES, public
from fedlab.privacy.scores_plan import SCORE, ScoresPlan
from fedlab.protocol.messages import ClientReply, EvaluateReply, EvaluateRequest, Release
from fedlab.seeds import random_stream
from fedlab.session import Session


def answer_evaluate(node: Node, request: EvaluateRequest) -> EvaluateReply:
    """Every client's scores on examples that it never trains on, in a run that asks for them (``Owner.admit``)."""
    session, started = node.session, time.time()
    state = from_wire(request.state, request.wire) | session.basis
    session.model.load(state)
    owners = [node.owners.one(client) for client in request.clients]
    return EvaluateReply(started, time.time(), tuple(_score(node, owner, state, request) for owner in owners))


def _score(node: Node, owner: Owner, state: State, request: EvaluateRequest) -> ClientReply:
    session = node.session
    if session.config.privacy.scores_sigma is not None:
        return _noised(session, owner, state, request)
    try:
        if request.personal:
            session.model.load(state | owner.load_personal(request.round + 1))
        held_out = session.data.local_test(owner.client)
        found = evaluate(session.model, session.data, held_out, session.config)
    except Exception as error:
        owner.note(error, "no scores")
        return ClientReply(owner.client, failure=failure_of(error))
    numbers = {name: value for name, value in found.items() if math.isfinite(value)}  # NaN where nothing is held out
    return ClientReply(owner.client, (public(SCORES, numbers),))


def _noised(session: Session, owner: Owner, state: State, request: EvaluateRequest) -> ClientReply:
    """The share of its held-out records that the model gets right, charged before they are looked at."""
    pending, released = PendingRelease(NOISED_SCORES, owner.guarded), list[Release]()
    try:
        account = ClientAccount(session, owner, request.run)
        sigma = session.config.privacy.scores_sigma
        assert sigma is not None
        plan = ScoresPlan(sigma, account.plan.n, account.plan.delta, account.plan.noise)
        again = pending.charge(account, _asked(account, plan, state, request))
        released += again if again is not None else _measured(session, owner, state, request, plan, pending)
    except Exception as error:
        pending.fail(error)
        owner.note(error, "no scores")
        return ClientReply(owner.client, failure=pending.failure)
    return ClientReply(owner.client, tuple(released))


def _asked(account: ClientAccount, plan: ScoresPlan, state: State, request: EvaluateRequest) -> Asked:
    """Sign the release's plan, in a run of its own in the same ledger; what it is charged under."""
    received = digest(state)
    terms = {**account.terms, **plan.terms(), "scope": scope_of({"accuracy": (1,)})}
    guard = account.beside(release_run(account.guard.run, NOISED_SCORES))
    if refusal := guard.plan(terms, {}):
        raise refusal
    asked = digest_of(request.run.configuration, received, request.run.basis, request.personal)
    return Asked(guard, terms, plan.event(), 1, received, asked)


def _measured(
    session: Session, owner: Owner, state: State, request: EvaluateRequest, plan: ScoresPlan, pending: PendingRelease
) -> Releases:
    if request.personal:
        session.model.load(state | owner.load_personal(request.round + 1))
    held_out = session.data.local_test(owner.client)
    share = primary_score(session.model, session.data, held_out, session.config)
    draws = random_stream(session.config.sampling_seed, "noise", owner.client, "scores")
    value = np.array([plan.privatise(share, len(held_out), draws)], dtype=np.float32)
    return pending.commit(1, {SCORE: value}, {SCORE: torch.from_numpy(value)})
