"""Before the first round: who is on this node, how large, what one round costs each, and its ledger so far."""

from __future__ import annotations

from clients.account import ClientAccount
from clients.node import Node
from fedlab.errors import ConfigError, FedlabError, PrivacyError
from fedlab.lora.state import part_of
from fedlab.privacy.release import SIZE, fields_of, public
from fedlab.protocol.messages import MOST_REASON, ClientReply, DescribeReply, DescribeRequest, Enrolment, Failure
from fedlab.train.check_gradients import require_per_example


def answer_describe(node: Node, request: DescribeRequest) -> DescribeReply:
    """Every client's declaration. Under DP it signs the plan of this run, or says why it will not."""
    present = node.owners.present(request.clients)
    return DescribeReply(tuple(_enrol(node, client, request) for client in present), node.owners.exclusive)


def _enrol(node: Node, client: str, request: DescribeRequest) -> Enrolment:
    session = node.session
    reply = ClientReply(client, (public(SIZE, {"examples": session.data.size(client)}),))
    plan = session.plan(client)
    if plan is None:
        return Enrolment(reply)
    event = fields_of(plan.event())
    try:
        scope = [name for name in session.model.parameters if part_of(name) in request.run.parts]
        require_per_example(session.model, session.config, scope)
        account = ClientAccount(session, node.owners.one(client), request.run.run, request.run.parts)
        refusal = account.sign()
        lines = account.lines_after(0)
    except (PrivacyError, ConfigError) as error:
        return Enrolment(_failed(reply, error), delta=plan.delta, event=event)
    reply = ClientReply(client, reply.releases, lines)
    return Enrolment(_failed(reply, refusal) if refusal else reply, account.guard.ledger.public, plan.delta, event)


def _failed(reply: ClientReply, error: FedlabError) -> ClientReply:
    return ClientReply(reply.client, reply.releases, reply.lines, Failure(str(error)[:MOST_REASON], refused=True))
