"""Send messages and collect replies as they come, where Flower's ``send_and_receive`` says nothing until all are in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedlab.run import interrupt

POLL_SECONDS = 0.02


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    on_reply: Callable[[Message], None] = lambda reply: None,
    meanwhile: Callable[[], object] = lambda: None,
) -> list[Message]:
    """Replies that arrived within ``timeout`` seconds, in no particular order; callers match them by node, never by
    position.

    A node that does not answer in time is simply missing from the list; its clients are then reported as failed.
    """
    pending = set(grid.push_messages(messages))
    deadline = time.monotonic() + timeout
    meanwhile()
    replies: list[Message] = []
    while pending and time.monotonic() < deadline:
        interrupt.check()
        arrived = list(grid.pull_messages(pending))
        for reply in arrived:
            pending.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
            on_reply(reply)
        if pending and not arrived:
            time.sleep(POLL_SECONDS)
    return replies
