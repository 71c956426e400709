"""The ClientApp: bytes in, one handler per message, bytes out. The only file of a client that knows Flower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.describe import answer_describe
from clients.evaluate import answer_evaluate
from clients.gram import answer_gram
from clients.node import Node, enter, join
from clients.receipts import answer_receipts
from clients.sum_keys import answer_keys
from clients.train import answer_train
from fedlab.protocol import Frame, ProtocolError, decode, encode
from fedlab.protocol.messages import REQUESTS, DescribeRequest
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
    """Decode the request, enter its run, answer it."""
    frame = _frame(message.content)
    request: Any = decode(frame, REQUESTS)
    memory: Any = context.state.config_records.setdefault(RECORD, ConfigRecord())
    if isinstance(request, DescribeRequest):
        node = join(request, memory, context.node_config)
    else:
        node = enter(request.run, memory, context.node_config)
    with torch_threads(node.session.config.run.threads):
        reply = encode(frame.kind, ANSWERS[frame.kind](node, request))
    return Message(RecordDict({RECORD: ConfigRecord(vars(reply))}), reply_to=message)


def _frame(content: RecordDict) -> Frame:
    """The frame in a message. Raises ProtocolError where there is none."""
    try:
        fields: dict[str, Any] = dict(content.config_records[RECORD])
        return Frame(**fields)
    except (KeyError, TypeError) as error:
        raise ProtocolError("record", f"the message holds no frame ({type(error).__name__})") from None
