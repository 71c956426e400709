"""The local backend: the same apps, unchanged, called in this process one node after the other.

For tests, debugging and single-device runs: no Ray, no threads, exceptions where they happen. Bitwise equal to the Ray
backend.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

from fedlab.config import RunConfig
from fedlab.run.launch.simulated import SIMULATED

logger = logging.getLogger("fedlab")
RUN_ID = 1
CLIENT_APP_ERROR = 2  # Flower's code for "the ClientApp raised"


class LocalGrid(Grid):
    """A Grid whose nodes are contexts in this process.

    A message is handled when its reply is pulled, in the order it was sent.
    """

    def __init__(self, client_app: Callable[[Message, Context], Message], nodes: int) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = RUN_ID  # Message() asks for them
        self._client_app = client_app
        self._contexts = {
            i + 10: Context(
                RUN_ID, i + 10, {"partition-id": i, "num-partitions": nodes, SIMULATED: True}, RecordDict(), {}
            )
            for i in range(nodes)
        }
        self._waiting: dict[str, Message] = {}

    @property
    def run(self) -> FlowerRun:
        return FlowerRun.create_empty(RUN_ID)

    def set_run(self, run: FlowerRun) -> None:
        """Nothing to set: there is one run."""

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError("deprecated in Flower; use Message(...)")

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._waiting[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        for message_id in [i for i in self._waiting if i in wanted][:1]:
            return [self._handle(self._waiting.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [reply for message_id in self.push_messages(messages) for reply in self.pull_messages([message_id])]

    def _handle(self, message: Message) -> Message:
        try:
            reply = self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # the contract of Flower's runtimes: an error reply
            logger.exception("node %d raised", message.metadata.dst_node_id)
            reply = Message(Error(code=CLIENT_APP_ERROR, reason=f"{type(error).__name__}: {error}"), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        return reply


def run_local(server_app: Any, client_app: Any, config: RunConfig, run_config: dict[str, Any]) -> None:
    """Run the server app over ``config.run.nodes`` in-process nodes; its exceptions pass through."""
    server_app(LocalGrid(client_app, config.run.nodes), Context(RUN_ID, RUN_ID, {}, RecordDict(), run_config))
