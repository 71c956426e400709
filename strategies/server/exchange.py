"""Requests out, replies in: the one place on the server where messages become Flower's records, and back.

Flower's ``send_and_receive`` says nothing until all replies are in, so replies are taken as they come.
"""

from __future__ import annotations

import time
from collections import Counter
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
LOOK_SECONDS = 5.0  # between two looks whether a node that has not answered was started again
NOT_TAKEN = "the server did not take the message for it: it was shut out, or the message is larger than server.max_body"
RECORD = "fedlab"  # of a message
TYPES = {"train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}  # others are queries
R = TypeVar("R")


@dataclass
class Answers(Generic[R]):
    """What came back of one request, by node. Every node that was asked is in exactly one of the two."""

    replies: dict[int, R] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # why there is no reply that could be used
    asked: Counter[int] = field(default_factory=Counter)  # how often: again, if it was started again


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
    replies, answers.asked = exchange(grid, messages, timeout, on_reply, meanwhile)
    answers.failed |= {node: NOT_TAKEN for node in requests if not answers.asked[node]}
    for node, message in replies:
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
) -> tuple[list[tuple[int, Message]], Counter[int]]:
    """Send each node its message, one at most.

    A node that is started again has lost what it was asked, and one whose server was away may have, so they are asked
    again; a client that had answered gives the same answer, for no further charge.

    Returns:
        Node and reply for those that arrived within ``timeout`` seconds, in no particular order (an error may come from
        the server, which says so in a node's place), and how often each node was asked: not at all, if its message was
        not taken.
    """
    asked = {message.metadata.dst_node_id: message for message in messages}
    started = _started(grid)
    pending = _push(grid, asked.values())
    times = Counter(pending.values())
    deadline, look = time.monotonic() + timeout, time.monotonic() + LOOK_SECONDS
    meanwhile()
    replies: list[tuple[int, Message]] = []
    while pending and time.monotonic() < deadline:
        interrupt.check()
        arrived = list(grid.pull_messages(set(pending)))
        for reply in arrived:
            node = pending.get(reply.metadata.reply_to_message_id)
            if node is None:
                continue  # nobody asked, or its answer is there
            pending = {message: other for message, other in pending.items() if other != node}
            replies.append((node, reply))
            on_reply()
        if pending and not arrived:
            time.sleep(POLL_SECONDS)
        if pending and time.monotonic() >= look:
            now, look = _started(grid), time.monotonic() + LOOK_SECONDS
            again = {node for node in pending.values() if node in now and now[node] != started.get(node)}
            started |= now
            more = _push(grid, [_same(asked[node]) for node in again])
            times.update(more.values())
            pending |= more
    return replies, times


def _push(grid: Grid, messages: Iterable[Message]) -> dict[str, int]:
    """Send messages; id → node of those that were taken."""
    sent = list(messages)
    taken = set(grid.push_messages(sent)) if sent else set()
    found = [message.metadata for message in sent]
    return {one.message_id: one.dst_node_id for one in found if one.message_id in taken}


def _started(grid: Grid) -> dict[int, str]:
    """Since when each node that is there, and the server between it and us, has been so without a break, as far as that
    is known.
    """
    nodes, outages = list(grid.get_nodes()), getattr(grid, "outages", 0)
    return {node.node_id: f"{node.last_activated_at} {outages}" for node in nodes}


def _same(message: Message) -> Message:
    """A message with the same content, under an id of its own."""
    return Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)


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
