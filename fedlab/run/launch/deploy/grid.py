"""Flower's HTTP grid for a server app that runs in our own process: patient where the SuperLink is away for a while,
and clear where the run was given up.

Flower's own client ends the process with a signal where it is refused, and waits for ever where nobody answers; a run
has to write down its end instead.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import httpx
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.retry import RetryInvoker, RetryState, constant
from flwr.superlink.grid import HttpGrid

from fedlab.errors import RunFailed
from fedlab.run import interrupt

OUTAGE_SECONDS = 600.0  # a server that is away for so long ends the run
RETRY_SECONDS = 1.0
AWAY = (502, 503, 504)
FIRST_LOOK, LAST_LOOK, LOOKS = 0.1, 1.0, 20  # seconds between two looks for replies: a part of the time waited so far
logger = logging.getLogger("fedlab")


class ServerLost(RunFailed):
    """The server is away, or has given the run up: nothing is wrong with the run, which may be submitted again."""


class DeployedGrid(HttpGrid):
    """A grid over the SuperLink's runtime interface.

    Args:
        address: host:port of the SuperLink.
        authority: certificate (PEM) of the authority that signed the SuperLink's.
        token: of the task that this process executes.

    Raises ServerLost, from every method, where the SuperLink is away for too long or has given the run up, and
    RunFailed where it refuses something.
    """

    def __init__(self, address: str, authority: bytes, token: str) -> None:
        super().__init__(address, insecure=False, root_certificates=authority, token=token)
        self.outages = 0  # times that the SuperLink was away: what nodes had just fetched may be lost
        self._retry_invoker = patient_invoker(address, self._count_outage)
        self._asked = self._looked = 0.0  # by the monotonic clock

    def _count_outage(self) -> None:
        self.outages += 1

    def get_nodes(self) -> Iterable[NodeInfo]:
        with _clear(self._addr):
            return super().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        with _clear(self._addr):
            ids = [str(one) for one in super().push_messages(sent)]
        if sent and not any(ids):
            raise RunFailed("the server took no message; they are too large for it, or all nodes were shut out")
        self._asked = time.monotonic()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there. Who asks again at once waits here: every look is a query of a database."""
        pause = min(max((time.monotonic() - self._asked) / LOOKS, FIRST_LOOK), LAST_LOOK)
        if (left := self._looked + pause - time.monotonic()) > 0:
            time.sleep(left)
        with _clear(self._addr):
            found = list(super().pull_messages(message_ids))
        self._looked = 0.0 if found else time.monotonic()
        return found


def patient_invoker(address: str, on_return: Callable[[], object] = lambda: None) -> RetryInvoker:
    """Calls that are tried again while the SuperLink is away, and never when it refuses.

    ``on_return``: called when it is there again.
    """
    told = threading.Event()

    def on_backoff(state: RetryState) -> None:
        interrupt.check()
        if not told.is_set():
            told.set()
            logger.warning("the server at %s does not answer; waiting for it", address)

    def on_success(state: RetryState) -> None:
        if told.is_set():
            told.clear()
            on_return()
            logger.warning("the server at %s answers again, after %.0f s", address, state.elapsed_time)

    return RetryInvoker(
        lambda: constant(RETRY_SECONDS),
        (httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=OUTAGE_SECONDS,
        on_success=on_success,
        on_backoff=on_backoff,
        jitter=None,
        should_giveup=_refused,
    )


def _refused(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code not in AWAY
    told = str(error).lower()
    return "certificate" in told or "ssl" in told


@contextmanager
def _clear(address: str) -> Iterator[None]:
    """What Flower's client raises, as what it means."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ServerLost(
                f"the server at {address} has given this run up: it did not hear of it for a minute, or the run was"
                " stopped there"
            ) from None
        raise RunFailed(f"the server at {address} answers {status}: {error.response.text[:200]}") from None
    except httpx.HTTPError as error:
        raise ServerLost(
            f"the server at {address} does not answer ({type(error).__name__}: {error}); start it with fedlab server"
        ) from None
