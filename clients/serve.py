"""The resident trainer of a client on a machine of its own: model, data, ledger and policy, behind a private socket.

``python -m clients.serve CLIENT.toml`` is started by ``fedlab client`` from the installed package. Whoever may connect,
one user that the kernel vouches for, sends protocol bytes and gets protocol bytes; every request passes its owner's
gate (``Owner.admit``), whoever carries it. One is answered at a time.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from clients.answer import answer
from clients.log import note
from clients.memory import DiskMemory
from clients.node import Memory
from clients.own_session import OwnSessions
from clients.owner import Owners, own_owner
from fedlab.config.client import ClientFile
from fedlab.errors import ConfigError, FedlabError
from fedlab.files import below
from fedlab.protocol import Frame
from fedlab.protocol.messages import Request
from fedlab.protocol.pipe import MOST, BrokenPipe, NothingCame, peer_user, receive, send
from fedlab.run.monitor.client import ClientMonitor
from fedlab.run.monitor.logs import keep_at_home, tell
from fedlab.run.places import LOG

logger = logging.getLogger("fedlab")
TOO_LATE = 75  # exit code of a trainer that missed its deadline
MOST_CONNECTIONS = 8  # at a time; others wait
PATIENCE = 60.0  # seconds that a connection may be silent before its request is there


class OwnDesk:
    """Where a client's requests arrive: it alone is here, with what its own file says."""

    def __init__(self, file: ClientFile) -> None:
        self.file, self._sessions = file, OwnSessions(file)

    def memory(self, run: str) -> Memory:
        """On this machine's disk, a directory per run."""
        return DiskMemory(below(self.file.home / "runs", run))

    def owners(self, request: Request) -> Owners:
        """The one owner of this machine."""
        return own_owner(self.file, request.run.run, self._sessions.open)

    def note(self, error: Exception) -> None:
        """Into the owner's own log."""
        note(self.file.home / "ledger" / LOG, self.file.client.id, error, "no answer")


class Trainer:
    """The socket, and one request after the other.

    Args:
        file: of the client.
        monitor: is told of every answer.
    """

    def __init__(self, file: ClientFile, monitor: ClientMonitor) -> None:
        self._desk, self._monitor, self._file = OwnDesk(file), monitor, file
        self._allowed = {os.getuid(), file.transport_user}
        self._connections = ThreadPoolExecutor(MOST_CONNECTIONS, "connection")
        self._work = ThreadPoolExecutor(1, "trainer")  # one thread, or torch would start its own anew for every request
        self._listener = listen(file.socket, shared=file.client.transport_user is not None)

    def run(self) -> None:
        """Answer until the listener is closed."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.submit(self._serve, connection)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._connections.shutdown(cancel_futures=True)
        self._work.shutdown(cancel_futures=True)

    def _serve(self, connection: socket.socket) -> None:
        """One connection: one request. Whoever goes away gets nothing, and nobody else notices."""
        with connection:
            user = peer_user(connection)
            if user is not None and user not in self._allowed:
                logger.warning("user %d is not allowed to connect; set client.transport_user if it should be", user)
                return
            try:
                connection.settimeout(PATIENCE)
                fields = receive(connection, MOST)
                connection.settimeout(None)
                reply, seconds = self._work.submit(self._answered, Frame(**fields)).result()
                send(connection, vars(reply))
                self._monitor.replied(fields["kind"], seconds, reply)
                self._monitor.look_up(self._file)
            except NothingCame:
                return
            except (BrokenPipe, TimeoutError, OSError) as error:
                logger.warning("a connection came to nothing: %s: %s", type(error).__name__, error)
            except Exception:  # in a thread nobody else would say it
                logger.exception("a connection came to nothing")

    def _answered(self, frame: Frame) -> tuple[Frame, float]:
        """The reply, and the seconds it took."""
        with deadline(self._file.machine.deadline):
            started = time.monotonic()
            return answer(frame, self._desk), time.monotonic() - started


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """End this process if the block takes longer: a computation that hangs cannot be ended otherwise. Whoever
    supervises it starts it again.
    """

    def end() -> None:
        logger.error("no answer after %g s (machine.deadline); the trainer ends and is started again", seconds)
        os._exit(TOO_LATE)

    timer = threading.Timer(seconds or 0, end)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def listen(path: Path, shared: bool) -> socket.socket:
    """A socket that only this user may connect to; ``shared``: others too, as far as its directory lets them.

    Raises ConfigError if another trainer listens there.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.connect(str(path))
        raise ConfigError(f"another trainer listens at {path}; a client is started once")
    except OSError:
        path.unlink(missing_ok=True)  # of one that was killed
    before = os.umask(0o111 if shared else 0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise ConfigError(
            f"client.socket = {str(path)!r} cannot be made ({error.strerror or error}); choose a shorter path on a"
            " local disk"
        ) from None
    finally:
        os.umask(before)
    listener.listen(16)
    return listener


def main(arguments: list[str] | None = None) -> None:
    """Serve one client until told to stop."""
    (path,) = arguments if arguments is not None else sys.argv[1:]
    try:
        file = ClientFile.load(path)
        os.environ.setdefault("FEDLAB_CACHE", str(file.home / "cache"))
        os.umask(0o077)
        monitor = ClientMonitor.of(file)
        trainer = Trainer(file, monitor)
    except FedlabError as error:
        sys.stderr.write(f"fedlab: error: {error}\n")
        raise SystemExit(error.exit_code) from None
    keep_at_home(file.home / "ledger" / LOG, file.log.format)
    monitor.look_up(file)
    monitor.ready(True)
    tell(f"the trainer listens at {file.socket}", client=file.client.id)
    trainer.run()


if __name__ == "__main__":
    main()
