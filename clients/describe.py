"""Before the first round: who is on this node, how large, what one round costs each, and its ledger so far."""

from __future__ import annotations

from dataclasses import replace

from clients.account import ClientAccount
from clients.node import Node
from clients.owner import Owner
from clients.pending import failure_of
from clients.secure_sum import sum_key
from fedlab.errors import ConfigError, PrivacyError
from fedlab.lora.state import part_of
from fedlab.privacy.release import SIZE, fields_of, public
from fedlab.privacy.secure_sum.settings import is_masked
from fedlab.protocol.messages import ClientReply, DescribeReply, DescribeRequest, Enrolment
from fedlab.protocol.sum_messages import SumKey
from fedlab.train.check_gradients import require_per_example


def answer_describe(node: Node, request: DescribeRequest) -> DescribeReply:
    """Every client's declaration. Under DP it signs the plan of this run, or says why it will not."""
    present = node.owners.present(request.clients)
    return DescribeReply(tuple(_enrol(node, client, request) for client in present), node.owners.exclusive)


def _enrol(node: Node, client: str, request: DescribeRequest) -> Enrolment:
    session, owner = node.session, node.owners.one(client)
    size = public(SIZE, {"examples": session.data.size(client)})
    if not owner.guarded:
        return Enrolment(ClientReply(client, (size,)), sum_key=_sum_key(node, owner, request))
    try:
        scope = [name for name in session.model.parameters if part_of(name) in request.run.parts]
        require_per_example(session.model, session.config, scope)
        account = ClientAccount(session, owner, request.run)
        refusal, lines = account.sign(), account.lines_after(0)
    except (PrivacyError, ConfigError) as error:
        owner.note(error, "no plan")
        return _declared(node, ClientReply(client, (size,), failure=failure_of(error, refused=True)))
    failure = failure_of(refusal) if refusal else None
    declared = _declared(node, ClientReply(client, (size,), lines, failure), account.guard.ledger.public)
    return declared if failure else replace(declared, sum_key=_sum_key(node, owner, request))


def _sum_key(node: Node, owner: Owner, request: DescribeRequest) -> SumKey | None:
    """Its key of this run's secure sums, if it has any."""
    return sum_key(owner, request.run.run) if is_masked(node.config, node.owners.exclusive) else None


def _declared(node: Node, reply: ClientReply, key: str = "") -> Enrolment:
    """A declaration with what one round would cost."""
    plan = node.session.plan(reply.client)
    assert plan is not None
    return Enrolment(reply, key, plan.delta, fields_of(plan.event()))
