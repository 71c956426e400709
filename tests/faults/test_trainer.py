"""The resident trainer and its socket: who goes away, sends rubbish or stays silent disturbs nobody else."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import clients.serve
from clients.serve import Trainer, deadline
from fedlab.errors import ConfigError
from fedlab.protocol import Frame
from fedlab.protocol.pipe import receive, send
from fedlab.run.monitor.client import ClientMonitor

WHOLE = {"kind": "train", "header": b"{}", "table": b"[]", "body": b""}
REPLY = Frame("train", b'{"started":0.0,"ended":0.0,"clients":[]}', b"[]", b"")


@pytest.fixture
def trainer(
    sites: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[], socket.socket]]:
    """A trainer that answers every request alike; makes connections to it."""
    monkeypatch.setattr(clients.serve, "answer", lambda frame, desk: REPLY)
    file = sites("north")["north"].file
    place = tmp_path / "t.sock"
    file = file.model_copy(update={"client": file.client.model_copy(update={"socket": str(place)})})
    served = Trainer(file, ClientMonitor("north"))
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()

    def connect() -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(20)
        made.connect(str(place))
        return made

    connect.file = file  # type: ignore[attr-defined]
    yield connect
    served.close()
    thread.join(10)


def answered(connect: Callable[[], socket.socket]) -> bool:
    with connect() as connection:
        send(connection, WHOLE)
        return bool(receive(connection)["header"] == REPLY.header)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"",
        b"rubbish\n",
        b"x" * 4096,
        b'{"kind": "train", "header": 5, "table": 0, "body": 0}\nab',
        b'{"kind": "train", "header": -1, "table": 0, "body": 0}\n',
        b'{"kind": "train", "header": 1, "table": 1, "body": 99999999999999}\n',
    ],
)
def test_what_is_no_request_is_dropped_and_the_next_one_is_answered(
    rubbish: bytes, trainer: Callable[[], socket.socket]
):
    with trainer() as connection:
        connection.sendall(rubbish)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert answered(trainer)


def test_who_is_silent_or_does_not_fetch_its_answer_keeps_nobody_waiting(trainer: Callable[[], socket.socket]):
    silent, gone = trainer(), trainer()
    send(gone, WHOLE)
    gone.close()
    assert answered(trainer)
    silent.close()
    assert answered(trainer)


def test_a_second_trainer_in_the_same_place_is_refused(trainer: Callable[[], socket.socket]):
    with pytest.raises(ConfigError, match="another trainer listens at"):
        Trainer(trainer.file, ClientMonitor("north"))  # type: ignore[attr-defined]
    assert answered(trainer)


def test_a_computation_that_hangs_ends_the_trainer_which_is_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with deadline(0.05):
        time.sleep(0.5)
    assert codes == [clients.serve.TOO_LATE]
    assert "no answer after 0.05 s (machine.deadline)" in caplog.text
    with deadline(5), deadline(None):
        pass
    assert codes == [clients.serve.TOO_LATE]
