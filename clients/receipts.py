"""After a round: the server's receipts, kept; and the ledger's lines that it does not know yet."""

from __future__ import annotations

import json

from clients.account import ClientAccount
from clients.node import Node
from fedlab.errors import PrivacyError
from fedlab.protocol.messages import MOST_REASON, ClientReply, Failure, ReceiptFor, ReceiptsReply, ReceiptsRequest


def answer_receipts(node: Node, request: ReceiptsRequest) -> ReceiptsReply:
    """Every client's new lines, after its receipt was kept."""
    return ReceiptsReply(tuple(_keep(node, entry, request) for entry in request.clients))


def _keep(node: Node, entry: ReceiptFor, request: ReceiptsRequest) -> ClientReply:
    try:
        account = ClientAccount(node.session, node.owners.one(entry.client), request.run.run, request.run.parts)
        if entry.receipt:
            account.guard.release(json.loads(entry.receipt))
        if request.closing:
            account.guard.close()
        return ClientReply(entry.client, lines=account.lines_after(entry.known))
    except (PrivacyError, ValueError) as error:
        return ClientReply(entry.client, failure=Failure(str(error)[:MOST_REASON]))
