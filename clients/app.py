"""The ClientApp of a simulation: Flower's records around ``clients.answer``.

A client on a machine of its own is never answered for here: its own carrier runs no app
(``fedlab.run.launch.deploy.carrier``).
"""

from __future__ import annotations

import logging
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.answer import answer as answered
from clients.node import Memory, owners_of
from clients.owner import Owners
from clients.refusal import unreadable
from fedlab.protocol import Frame, ProtocolError
from fedlab.protocol.messages import Request
from fedlab.run.launch.simulated import simulated

RECORD = "fedlab"  # of a message, and of what a node remembers
app = ClientApp()
logger = logging.getLogger("fedlab")


class SimulatedDesk:
    """A node of a simulation, which plays any client of the run.

    Args:
        memory: what it remembers, in Flower's context.
        node_config: of the node, as whoever started it wrote it.
    """

    def __init__(self, memory: Memory, node_config: Any) -> None:
        self._memory, self._node_config = memory, node_config

    def memory(self, run: str) -> Memory:
        """Flower keeps one per run."""
        return self._memory

    def owners(self, request: Request) -> Owners:
        """Those of the partition. Raises ProtocolError on a machine that does not itself say that it simulates."""
        if not simulated(self._node_config):
            raise ProtocolError(
                "run", "this node is none of a simulation; start a client on a machine of its own with fedlab client"
            )
        return owners_of(request, self._memory)

    def note(self, error: Exception) -> None:
        """Into the process's log."""
        logger.warning("a node gave no answer: %s", error)


@app.query()
@app.train()
@app.evaluate()
def answer(message: Message, context: Context) -> Message:
    """The reply to a message."""
    memory: Any = context.state.config_records.setdefault(RECORD, ConfigRecord())
    reply = respond(message.content, SimulatedDesk(memory, context.node_config))
    return Message(RecordDict({RECORD: ConfigRecord(vars(reply))}), reply_to=message)


def respond(content: RecordDict, desk: SimulatedDesk) -> Frame:
    """The reply to what a message holds, be it a frame or not."""
    try:
        fields: dict[str, Any] = dict(content.config_records[RECORD])
        frame = Frame(**fields)
    except (KeyError, TypeError) as error:
        problem = ProtocolError("record", f"the message holds no frame ({type(error).__name__})")
        desk.note(problem)
        return unreadable(problem)
    return answered(frame, desk)
