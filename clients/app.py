"""The ClientApp: bytes in, one handler per message, bytes out. The only file of a client that knows Flower.

Whatever goes wrong, the answer is a reply with codes of a closed list; nothing is raised to Flower, which would send
its text to the server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.describe import answer_describe
from clients.evaluate import answer_evaluate
from clients.gram import answer_gram
from clients.node import Node, enter, owners_of
from clients.owner import Owners
from clients.receipts import answer_receipts
from clients.refusal import nothing, unreadable
from clients.sum_keys import answer_keys
from clients.train import answer_train
from fedlab.protocol import Frame, ProtocolError, decode, encode
from fedlab.protocol.messages import REQUESTS, Request
from fedlab.session import torch_threads

RECORD = "fedlab"  # of a message, and of what a node remembers
ANSWERS: dict[str, Callable[[Node, Any], object]] = {
    "describe": answer_describe,
    "train": answer_train,
    "evaluate": answer_evaluate,
    "receipts": answer_receipts,
    "keys": answer_keys,
    "gram": answer_gram,
}
app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """Decode the request, pass its owners' gate, answer it."""
    memory: Any = context.state.config_records.setdefault(RECORD, ConfigRecord())
    reply = respond(message.content, memory, context.node_config)
    return Message(RecordDict({RECORD: ConfigRecord(vars(reply))}), reply_to=message)


def respond(content: RecordDict, memory: Any, node_config: Any) -> Frame:
    """The reply to a message, whatever it holds and whatever happens."""
    request: Request | None = None
    owners: Owners | None = None
    try:
        frame = _frame(content)
        request = cast(Request, decode(frame, REQUESTS))
        owners = owners_of(request, memory, node_config)
        node = enter(request, owners, memory)
        with torch_threads(node.config.run.threads):
            return encode(frame.kind, ANSWERS[frame.kind](node, request))
    except Exception as error:
        if request is None or owners is None:
            return unreadable(error, node_config)
        return nothing(request, owners, error)


def _frame(content: RecordDict) -> Frame:
    """The frame in a message. Raises ProtocolError where there is none."""
    try:
        fields: dict[str, Any] = dict(content.config_records[RECORD])
        return Frame(**fields)
    except (KeyError, TypeError) as error:
        raise ProtocolError("record", f"the message holds no frame ({type(error).__name__})") from None
