"""One request of evaluation: the global model, with what a client keeps of it, on each client's held-out examples."""

from __future__ import annotations

import math
import time

from clients.node import Node
from clients.owner import Owner
from clients.pending import failure_of
from fedlab.evaluate import evaluate
from fedlab.lora.state import State, from_wire
from fedlab.privacy.release import SCORES, public
from fedlab.protocol.messages import ClientReply, EvaluateReply, EvaluateRequest


def answer_evaluate(node: Node, request: EvaluateRequest) -> EvaluateReply:
    """Every client's scores on examples that it never trains on, in a run that asks for them (``Owner.admit``)."""
    session, started = node.session, time.time()
    state = from_wire(request.state, request.wire) | session.basis
    session.model.load(state)
    owners = [node.owners.one(client) for client in request.clients]
    return EvaluateReply(started, time.time(), tuple(_score(node, owner, state, request) for owner in owners))


def _score(node: Node, owner: Owner, state: State, request: EvaluateRequest) -> ClientReply:
    session = node.session
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
