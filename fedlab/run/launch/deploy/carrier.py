"""The executor of a client: takes each task of its SuperNode and hands the message to the app that is installed here.

Flower's own executor installs the bundle that a server submits, and starts a process for every message that runs what
is in it. This one does neither: no code of a server runs on a client's machine, and a message costs no start of a
process. It holds no data and no key, only the SuperNode's secret and whatever the app needs to reach the trainer.

``python -m fedlab.run.launch.deploy.carrier HOST:PORT SECRET_FILE [MODULE:APP]``
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fedlab.run.launch.deploy.heartbeat import Heartbeat
from fedlab.run.launch.reference import load_reference

SHIM = "clients.shim:app"
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
LOOK_SECONDS = 0.1  # between two looks for a task, on loopback
AWAY_SECONDS = 1.0  # between two tries while the SuperNode is away
CALL_SECONDS = 60.0
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
        signing = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE}))
        self._executor = self._client(signing)

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


def main() -> None:
    address, secret, *app = sys.argv[1:]
    logging.getLogger("flwr").setLevel(logging.WARNING)
    Carrier(address, Path(secret).read_bytes(), load_reference(app[0] if app else SHIM)).run()


if __name__ == "__main__":
    main()
