"""Requests out, replies in: the one place on the server where messages become Flower's records, and back.

Flower's ``send_and_receive`` says nothing until all replies are in, so replies are taken as they come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedlab.protocol import Frame, ProtocolError, decode, encode_all
from fedlab.protocol.failures import explained
from fedlab.protocol.messages import NODE_FAILURE, REPLIES, NodeFailure
from fedlab.run import interrupt

POLL_SECONDS = 0.02
RECORD = "fedlab"  # of a message
TYPES = {"train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}  # others are queries
R = TypeVar("R")


@dataclass
class Answers(Generic[R]):
    """What came back of one request, by node. Every node that was asked is in exactly one of the two."""

    replies: dict[int, R] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # why there is no reply that could be used


def ask(
    grid: Grid,
    kind: str,
    requests: Mapping[int, Any],
    reply_type: type[R],
    timeout: float,
    most_bytes: Mapping[int, int] | None = None,
    on_reply: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Answers[R]:
    """Send each node its request and wait for the replies.

    Args:
        grid: Flower's.
        kind: of the message, a key of ``fedlab.protocol.messages.REQUESTS``.
        requests: node → request.
        reply_type: what a node answers with.
        timeout: seconds; a node that has not answered by then has failed.
        most_bytes: node → bytes of arrays that its reply may hold; None where nothing bounds them.
        on_reply: called as each reply comes.
        meanwhile: called once, between sending and waiting.
    """
    assert REPLIES[kind] is reply_type
    frames = encode_all(kind, list(requests.values()))
    messages = [
        Message(RecordDict({RECORD: ConfigRecord(vars(frame))}), node, TYPES.get(kind, MessageType.QUERY))
        for node, frame in zip(requests, frames, strict=True)
    ]
    answers: Answers[R] = Answers()
    kinds: dict[str, Any] = {kind: reply_type, NODE_FAILURE: NodeFailure}
    for asked, message in exchange(grid, messages, timeout, on_reply, meanwhile):
        node = asked.metadata.dst_node_id  # an error may come from whoever was to deliver it
        if node in answers.replies or node in answers.failed:
            continue  # a duplicate: the first counts
        if message.has_error():
            answers.failed[node] = f"node failed: {_last_line(message.error.reason)}"
            continue
        try:
            reply = decode(_frame(message.content), kinds, (most_bytes or {}).get(node))
        except ProtocolError as error:
            answers.failed[node] = f"malformed reply: {error}"
            continue
        if isinstance(reply, NodeFailure):
            answers.failed[node] = f"node failed: {explained(reply.code)}"
        else:
            answers.replies[node] = reply
    for node in requests:
        if node not in answers.replies:
            answers.failed.setdefault(node, f"no reply within {timeout:.0f} s")
    return answers


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    on_reply: Callable[[], object] = lambda: None,
    meanwhile: Callable[[], object] = lambda: None,
) -> list[tuple[Message, Message]]:
    """What was asked, and its reply, for those that arrived within ``timeout`` seconds, in no particular order."""
    messages = list(messages)
    asked = dict(zip(grid.push_messages(messages), messages, strict=True))
    pending = set(asked)
    deadline = time.monotonic() + timeout
    meanwhile()
    replies: list[tuple[Message, Message]] = []
    while pending and time.monotonic() < deadline:
        interrupt.check()
        arrived = list(grid.pull_messages(pending))
        for reply in arrived:
            name = reply.metadata.reply_to_message_id
            if name not in pending:
                continue  # nobody asked, or it came before
            pending.discard(name)
            replies.append((asked[name], reply))
            on_reply()
        if pending and not arrived:
            time.sleep(POLL_SECONDS)
    return replies


def _frame(content: RecordDict) -> Frame:
    """The frame in a reply. Raises ProtocolError where there is none."""
    try:
        fields: dict[str, Any] = dict(content.config_records[RECORD])
        return Frame(**fields)
    except (KeyError, TypeError) as error:
        raise ProtocolError("record", f"the message holds no frame ({type(error).__name__})") from None


def _last_line(reason: str | None) -> str:
    lines = [line for line in (reason or "").strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "unknown"
