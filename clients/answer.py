"""Bytes in, bytes out: one handler per message, and a reply whatever happens. Knows no Flower.

Whatever goes wrong, the answer is a reply with codes of a closed list; nothing is raised to whoever carries the bytes,
which would send its text to the server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from clients.describe import answer_describe
from clients.evaluate import answer_evaluate
from clients.gram import answer_gram
from clients.node import Memory, Node, enter
from clients.owner import Owners
from clients.receipts import answer_receipts
from clients.refusal import nothing, unreadable
from clients.secure_sum import answer_confirm, answer_prepare, answer_unmask
from clients.train import answer_train
from fedlab.protocol import Frame, decode, encode
from fedlab.protocol.messages import REQUESTS, Request
from fedlab.protocol.version import check_version
from fedlab.session import torch_threads

ANSWERS: dict[str, Callable[[Node, Any], object]] = {
    "describe": answer_describe,
    "train": answer_train,
    "evaluate": answer_evaluate,
    "receipts": answer_receipts,
    "prepare": answer_prepare,
    "confirm": answer_confirm,
    "unmask": answer_unmask,
    "gram": answer_gram,
}


class Desk(Protocol):
    """Where requests arrive: who the owners here are, and what is remembered of a run."""

    def memory(self, run: str) -> Memory:
        """What is remembered of a run between its messages."""

    def owners(self, request: Request) -> Owners:
        """The owners here. Raises ProtocolError where nobody is."""

    def note(self, error: Exception) -> None:
        """Log why nobody could be asked."""


def answer(frame: Frame, desk: Desk) -> Frame:
    """The reply to a message, whatever it holds and whatever happens: its owners' gate, then its handler."""
    request: Request | None = None
    owners: Owners | None = None
    try:
        check_version(frame)
        request = cast(Request, decode(frame, REQUESTS))
        owners = desk.owners(request)
        node = enter(request, owners, desk.memory(request.run.run))
        with torch_threads(owners.threads or node.config.run.threads):
            return encode(frame.kind, ANSWERS[frame.kind](node, request))
    except Exception as error:
        if request is None or owners is None:
            desk.note(error)
            return unreadable(error)
        return nothing(request, owners, error)
