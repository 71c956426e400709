"""What carries messages between a client's SuperNode and its resident trainer: ``python -m …carrier ADDRESS SECRET
SOCKET``.

Flower's own executor would run the app that the server submits, in a new process for every message. This one runs no
app: it takes the SuperNode's tasks, passes each message's bytes to the trainer, and its answer's bytes back. So no code
that a server sends runs on a client, and nothing is loaded per message. It holds no data and no key but the secret that
lets it take tasks, and is confined besides.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlab.protocol.pipe import receive, send

RECORD = "fedlab"  # of a message
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
POLL_SECONDS = 0.1
PATIENCE = 60.0  # seconds to wait for a trainer that is being started again
FAILED = {"kind": "node-failure", "header": b'{"code":"failed"}', "table": b"[]", "body": b""}
logger = logging.getLogger("fedlab")


def carry(address: str, secret: bytes, trainer: Path) -> None:
    """Carry messages for ever.

    Args:
        address: host:port of the SuperNode's runtime interface, on loopback.
        secret: lets its holder take tasks.
        trainer: the resident trainer's socket.
    """
    allowed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE}))
    with _client(address, allowed) as client:
        while True:
            try:
                found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
            except httpx.HTTPError as error:
                logger.warning("the SuperNode does not answer (%s)", type(error).__name__)
                time.sleep(1.0)
                continue
            if found.HasField("task") and found.token:
                _execute(address, found.token, trainer)
            else:
                time.sleep(POLL_SECONDS)


def _execute(address: str, token: str, trainer: Path) -> None:
    """One task: one message there, one answer back. What goes wrong ends this task and no other."""
    context: Context | None = None
    outcome, details = SubStatus.FAILED, "failed"
    with _client(address, RuntimeTokenHttpInterceptor(token)) as client:
        alive = HeartbeatSender(make_task_heartbeat_fn_http(client))
        alive.start()
        try:
            message, context, _, _ = pull_task_input(client)
            fields = pass_on(message.content, trainer)
            reply = Message(RecordDict({RECORD: ConfigRecord(fields)}), reply_to=message)
            push_message(client, reply, context)
            outcome, details = SubStatus.COMPLETED, ""
        except Exception as error:
            logger.warning("a message was not carried: %s: %s", type(error).__name__, error)
        finally:
            with contextlib.suppress(httpx.HTTPError):
                push_task_output(client, context, outcome, details)
            if alive.is_running:
                alive.stop()


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


def _client(address: str, interceptor: Any) -> RuntimeHttpClient:
    """A client of the SuperNode's runtime interface, which is on loopback, without TLS, behind the secret."""
    return RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), interceptor],
        retry_invoker=make_simple_http_retry_invoker(),
    )


def main() -> None:
    """Carry messages until told to stop."""
    address, secret, trainer = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request
    carry(address, Path(secret).read_bytes(), Path(trainer))


if __name__ == "__main__":
    main()
