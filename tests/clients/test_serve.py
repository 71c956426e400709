"""The resident trainer's socket: who may connect, what becomes of what comes, and that nobody's leaving ends it."""

from __future__ import annotations

import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import clients.serve
from clients.serve import Trainer
from fedlab.config.client import ClientFile
from fedlab.errors import ConfigError
from fedlab.protocol import Frame, decode
from fedlab.protocol.messages import NODE_FAILURE, NodeFailure
from fedlab.protocol.pipe import receive, send
from fedlab.run.monitor.client import ClientMonitor

FILE = """
[client]
id = "north"
home = "h"
{more}
[data]
path = "notes.csv"
text = "t"
label = "l"
[models.m]
[policy]
min_sigma = 1.0
[budget]
epsilon = 2.0
"""


@pytest.fixture
def file(tmp_path: Path) -> ClientFile:
    return ClientFile.parse(FILE.format(more=""), tmp_path)


@pytest.fixture
def serving(file: ClientFile) -> Iterator[ClientFile]:
    """A trainer that listens in a thread."""
    trainer = Trainer(file, ClientMonitor("north"))
    thread = threading.Thread(target=trainer.run, daemon=True)
    thread.start()
    yield file
    trainer.close()
    thread.join(10)


def connected(file: ClientFile) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.settimeout(30)
    found.connect(str(file.socket))
    return found


def ask(file: ClientFile, kind: str = "train", header: bytes = b"{}") -> NodeFailure:
    with connected(file) as connection:
        send(connection, {"kind": kind, "header": header, "table": b"[]", "body": b""})
        return decode(Frame(**receive(connection)), {NODE_FAILURE: NodeFailure})


def test_only_its_own_user_may_open_the_socket(serving: ClientFile):
    assert stat.S_IMODE(serving.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(serving.home.stat().st_mode) == 0o700


def test_another_user_that_gets_there_all_the_same_is_told_nothing(
    serving: ClientFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(clients.serve, "peer_user", lambda connection: 4711)
    with connected(serving) as connection:
        assert connection.recv(1) == b""
    assert "user 4711 is not allowed to connect" in caplog.text


@pytest.mark.parametrize(
    ("kind", "header"), [("train", b"{}"), ("pickle", b"{}"), ("describe", b"\x80\x04x"), ("", b"")]
)
def test_bytes_that_are_no_request_are_answered_with_a_code(kind: str, header: bytes, serving: ClientFile):
    assert ask(serving, kind, header).code == "request"
    assert "no answer" in (serving.home / "ledger" / "log.txt").read_text()


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "train", "header": 99999999999, "table": 0, "body": 0}\n',
        b'{"kind": "train", "header": 1e999, "table": 0, "body": 0}\n',
        b'{"kind": "train", "header": -1, "table": 0, "body": 0}\n',
        b'{"kind": "train", "header": "x"}\n',
        b"[1]\n",
        b"x" * 600,
        b'{"kind": "train", "header": 5, "table": 0, "body": 0}\nab',
    ],
)
def test_what_is_no_frame_ends_its_own_connection_and_no_other(line: bytes, serving: ClientFile):
    with connected(serving) as connection:
        connection.sendall(line)
        connection.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError):
            receive(connection)
    assert ask(serving).code == "request"


def test_who_only_looks_leaves_no_line_in_the_log(serving: ClientFile, caplog: pytest.LogCaptureFixture):
    for _ in range(3):
        connected(serving).close()
    assert ask(serving).code == "request"
    assert "came to nothing" not in caplog.text


def test_a_client_is_started_once(serving: ClientFile):
    with pytest.raises(ConfigError, match="another trainer listens"):
        Trainer(serving, ClientMonitor("north"))


def test_the_socket_of_one_that_was_killed_is_taken_over(file: ClientFile):
    file.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(file.socket))
    trainer = Trainer(file, ClientMonitor("north"))
    trainer.close()


def test_a_user_that_is_none_is_named(tmp_path: Path):
    file = ClientFile.parse(FILE.format(more='transport_user = "nobody-of-this-name"'), tmp_path)
    with pytest.raises(
        ConfigError, match=r"client\.transport_user = 'nobody-of-this-name': this machine has no such user"
    ):
        Trainer(file, ClientMonitor("north"))
