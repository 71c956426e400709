"""The reply of a node that gives nothing: codes where releases would stand, and the text in the owners' own log."""

from __future__ import annotations

import time

from clients.log import note
from clients.node import asked
from clients.owner import Owners
from clients.pending import failure_of
from fedlab.errors import FedlabError
from fedlab.protocol import Frame, encode
from fedlab.protocol.failures import code_of
from fedlab.protocol.messages import (
    NODE_FAILURE,
    ClientReply,
    DescribeReply,
    DescribeRequest,
    Enrolment,
    EvaluateReply,
    EvaluateRequest,
    GramReply,
    GramRequest,
    NodeFailure,
    ReceiptsReply,
    ReceiptsRequest,
    Request,
    TrainReply,
    TrainRequest,
)
from fedlab.protocol.sum_messages import (
    Confirmation,
    ConfirmReply,
    ConfirmRequest,
    Preparation,
    PrepareReply,
    PrepareRequest,
    Revealed,
    UnmaskReply,
    UnmaskRequest,
)


def nothing(request: Request, owners: Owners, error: Exception) -> Frame:
    """The reply to a request that was refused, or that failed as a whole: one code for every client it concerns.

    A node that could not even prepare a run of a simulation answers as a node.
    """
    if isinstance(request, DescribeRequest) and not owners.exclusive:
        note(owners.log, "node", error, "the run could not be prepared")
        return encode(NODE_FAILURE, NodeFailure(code_of(error)))
    named = owners.present(()) if owners.exclusive else asked(request, owners)
    replies = tuple(_reply(request, owners, client, error) for client in dict.fromkeys(named))
    return encode(*_whole(request, owners, replies))


def _whole(request: Request, owners: Owners, replies: tuple[ClientReply, ...]) -> tuple[str, object]:
    """Kind and message of a reply that is made of these."""
    now = time.time()
    match request:
        case DescribeRequest():
            return "describe", DescribeReply(tuple(map(Enrolment, replies)), owners.exclusive)
        case TrainRequest():
            return "train", TrainReply(now, now, replies)
        case EvaluateRequest():
            return "evaluate", EvaluateReply(now, now, replies)
        case GramRequest():
            return "gram", GramReply(now, now, replies, None)
        case ReceiptsRequest():
            return "receipts", ReceiptsReply(replies)
        case PrepareRequest():
            return "prepare", PrepareReply(tuple(Preparation(r.client, failure=r.failure) for r in replies))
        case ConfirmRequest():
            return "confirm", ConfirmReply(tuple(Confirmation(r.client, failure=r.failure) for r in replies))
        case UnmaskRequest():
            return "unmask", UnmaskReply(tuple(Revealed(r.client, failure=r.failure) for r in replies))


def _reply(request: Request, owners: Owners, client: str, error: Exception) -> ClientReply:
    """A code, and the lines of the ledger that the server does not know, a refusal's among them."""
    failure = failure_of(error)
    note(owners.log, client, error, f"nothing for a {type(request).__name__}")
    if not isinstance(request, TrainRequest | GramRequest | ReceiptsRequest):
        return ClientReply(client, failure=failure)
    known = next((entry.known for entry in request.clients if entry.client == client), None)
    try:
        lines = owners.one(client).lines_after(request.run.run, known) if known is not None else None
    except FedlabError:
        lines = None
    return ClientReply(client, lines=lines, failure=failure)


def unreadable(error: Exception) -> Frame:
    """The reply where the request cannot be read, or nobody is there to be asked."""
    return encode(NODE_FAILURE, NodeFailure(code_of(error)))
