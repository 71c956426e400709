"""Flower is told that a task is alive: a server's run, or a client's answer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import httpx
from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
from flwr.supercore.runtime import RuntimeHttpClient

SECONDS = 10.0  # Flower gives a task up that it has not heard of for a minute
AGAIN_SECONDS = 1.0
AWAY = (502, 503, 504)


class Heartbeat:
    """Tells it, from a thread, as long as it is open.

    Args:
        client: makes a client of the runtime interface that bears the task's token and asks once.
    """

    def __init__(self, client: Callable[[], RuntimeHttpClient]) -> None:
        self._client = client
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(1)  # it may be waiting for an answer, and is a daemon

    def _beat(self) -> None:
        with self._client() as client:
            while not self._done.is_set():
                try:
                    heard = client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
                except httpx.HTTPStatusError as error:
                    heard = error.response.status_code in AWAY
                    self._done.wait(AGAIN_SECONDS)
                except httpx.TransportError:
                    heard = True
                    self._done.wait(AGAIN_SECONDS)
                    continue
                if not heard:
                    return  # it was given up; the next call of the grid says so
                self._done.wait(SECONDS)
