"""After a round: the server's receipts, kept; and the ledger's lines that it does not know yet. No data are opened."""

from __future__ import annotations

import json

from clients.account import release_run
from clients.kept import forget
from clients.node import Node
from clients.pending import failure_of
from clients.secure_sum import forget as forget_sums
from fedlab.privacy.ledger.ledger import lines_after
from fedlab.privacy.release import GRAM, NOISED_SCORES
from fedlab.protocol.messages import ClientReply, ReceiptFor, ReceiptsReply, ReceiptsRequest


def answer_receipts(node: Node, request: ReceiptsRequest) -> ReceiptsReply:
    """Every client's new lines, after its receipt was kept."""
    return ReceiptsReply(tuple(_keep(node, entry, request) for entry in request.clients))


def _keep(node: Node, entry: ReceiptFor, request: ReceiptsRequest) -> ClientReply:
    owner = node.owners.one(entry.client)
    try:
        guard = owner.guard(request.run.run)
        if entry.receipt:
            guard.release(json.loads(entry.receipt))
        if request.closing:
            guard.close()
            beside = [release_run(guard.run, name) for name in (GRAM, NOISED_SCORES)]
            forget(owner.places.ledgers, owner.client, (guard.run, *beside))
            forget_sums(owner, guard.run)
        with guard.ledger.locked():
            return ClientReply(entry.client, lines=lines_after(guard.ledger.entries, entry.known))
    except Exception as error:
        owner.note(error, "no receipt kept")
        return ClientReply(entry.client, failure=failure_of(error))
