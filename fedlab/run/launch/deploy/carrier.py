"""The executor of a client: takes each task of its SuperNode and passes the message's bytes to the resident trainer.

Flower's own executor installs the bundle that a server submits, and starts a process for every message that runs what
is in it. This one does neither: no code of a server runs on a client's machine, and a message costs no start of a
process. It holds no data and no key, only the SuperNode's secret and the way to the trainer's socket, and is confined
besides (``confine``).

``python -m fedlab.run.launch.deploy.carrier HOST:PORT SECRET_FILE SOCKET`` (or MODULE:APP of an app that is installed)
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlab.protocol.pipe import receive, send
from fedlab.run.launch.deploy.heartbeat import Heartbeat
from fedlab.run.launch.deploy.tasks import executor
from fedlab.run.launch.reference import load_reference

RECORD = "fedlab"  # of a message
LOOK_SECONDS = 0.1  # between two looks for a task, on loopback
AWAY_SECONDS = 1.0  # between two tries while the SuperNode is away
CALL_SECONDS = 60.0
PATIENCE = 60.0  # seconds to wait for a trainer that is being started again
FAILED = {"kind": "node-failure", "header": b'{"code":"failed"}', "table": b"[]", "body": b""}
App = Callable[[Message, Context], Message]
logger = logging.getLogger("fedlab")


class Carrier:
    """Executes the tasks of one SuperNode, one after the other.

    Args:
        address: host:port of its runtime interface, on loopback.
        secret: of its executors.
        app: answers messages, whatever bundle they came with.
    """

    def __init__(self, address: str, secret: bytes, app: App) -> None:
        self._address, self._app = address, app
        self._executor = self._client(executor(secret))

    def run(self) -> None:
        """Work until the process ends."""
        while True:
            try:
                worked = self.work()
            except Exception as error:  # a task that is lost is noticed by its node; the next one may be well
                logger.warning("a task of the SuperNode at %s was lost: %s", self._address, type(error).__name__)
                time.sleep(AWAY_SECONDS)
                continue
            if not worked:
                time.sleep(LOOK_SECONDS)

    def work(self) -> bool:
        """Take a task and answer its message; whether there was one. Raises httpx.HTTPError where nobody answers."""
        found = self._executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        if not found.HasField("task") or not found.token:
            return False
        token = found.token
        with self._client(RuntimeTokenHttpInterceptor(token)) as client:
            with Heartbeat(lambda: self._client(RuntimeTokenHttpInterceptor(token))):
                message, context, _, _ = pull_task_input(client)
                status = SubStatus.COMPLETED
                try:
                    reply = self._app(message, context)
                except Exception as error:  # its text stays here
                    logger.warning("a message could not be answered: %s", type(error).__name__)
                    status = SubStatus.FAILED
                    reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "failed"), reply_to=message)
                push_message(client, reply, context)
            with contextlib.suppress(httpx.HTTPError):  # the reply is there; the node has noticed
                push_task_output(client, context, status, "")
        return True

    def _client(self, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        return RuntimeHttpClient(f"http://{self._address}", interceptors=[version, interceptor], timeout=CALL_SECONDS)


def to_trainer(place: Path) -> App:
    """An app that passes every message to the trainer whose socket this is."""

    def app(message: Message, context: Context) -> Message:
        del context
        return Message(RecordDict({RECORD: ConfigRecord(pass_on(message.content, place))}), reply_to=message)

    return app


def pass_on(content: RecordDict, trainer: Path, patience: float = PATIENCE) -> dict[str, Any]:
    """The fields of the frame that the trainer answers with; a bare code of failure where it is not there.

    Nothing else that went wrong is told: its text could say what the server may not know.
    """
    try:
        fields: dict[str, Any] = dict(content.config_records[RECORD])
        with _connected(trainer, patience) as connection:
            send(connection, fields)
            return receive(connection)
    except Exception as error:
        logger.warning("the trainer gave no answer: %s: %s", type(error).__name__, error)
        return dict(FAILED)


def _connected(trainer: Path, patience: float) -> socket.socket:
    """A connection to the trainer, which may be starting. Raises OSError when patience ends."""
    deadline = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(trainer))
            return connection
        except OSError:
            connection.close()
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def main() -> None:
    address, secret, app = sys.argv[1:]
    logging.getLogger("flwr").setLevel(logging.WARNING)
    Carrier(
        address, Path(secret).read_bytes(), to_trainer(Path(app)) if app.startswith("/") else load_reference(app)
    ).run()


if __name__ == "__main__":
    main()
