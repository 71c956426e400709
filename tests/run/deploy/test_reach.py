"""What a client is told where its server's certificate is not what it should be: real TLS on loopback."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedlab.errors import ConfigError, RunFailed
from fedlab.run.launch.deploy import certificates, keys
from fedlab.run.launch.deploy.reach import check_server_certificate


@contextmanager
def serving(directory: Path, tls: bool = True) -> Iterator[str]:
    """A server that shows a directory's certificate and says nothing; its port on localhost."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.crt", directory / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    plain, _ = listening.accept()
                except OSError:
                    return
                try:
                    if tls:
                        context.wrap_socket(plain, server_side=True).close()
                    else:
                        plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                        plain.close()
                except OSError:
                    pass

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"localhost:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    keys.init(tmp_path / "keys", ["fed.example.org"])
    return tmp_path / "keys"


def remade(directory: Path, begin: datetime, days: int) -> None:
    authority = certificates.read_certificate(directory / "ca.crt").certificate
    ca_key, key = (certificates.read_private_key(directory / name) for name in ("ca.key", "server.key"))
    made = certificates.make_server_certificate(authority, ca_key, key, ["fed.example.org"], days, begin)
    (directory / "server.crt").write_bytes(made)


def test_the_right_server_is_reached(directory: Path):
    with serving(directory) as address:
        assert check_server_certificate(address, directory / "ca.crt") == []


def test_a_certificate_that_ends_soon_is_warned_of(directory: Path):
    keys.renew(directory, days=3)
    with serving(directory) as address:
        assert "in 2 days; tell the coordinator" in check_server_certificate(address, directory / "ca.crt")[0]


def test_an_expired_certificate_is_refused(directory: Path):
    remade(directory, datetime.now(UTC) - timedelta(days=20), 10)
    with serving(directory) as address, pytest.raises(ConfigError, match=r"has expired on 20.*fedlab keys renew"):
        check_server_certificate(address, directory / "ca.crt")


def test_one_from_tomorrow_is_a_matter_of_clocks(directory: Path):
    remade(directory, datetime.now(UTC) + timedelta(days=1), 10)
    with serving(directory) as address, pytest.raises(ConfigError, match=r"not valid yet.*set the clock"):
        check_server_certificate(address, directory / "ca.crt")


def test_another_authority_is_refused(directory: Path, tmp_path: Path):
    keys.init(tmp_path / "other", ["fed.example.org"])
    with serving(directory) as address, pytest.raises(ConfigError, match="not signed by the authority in"):
        check_server_certificate(address, tmp_path / "other" / "ca.crt")


def test_another_name_is_refused_and_the_names_are_told(directory: Path, monkeypatch: pytest.MonkeyPatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1" if "intranet" in host else host, *a, **k)
    )
    with serving(directory) as address:
        port = address.rpartition(":")[2]
        with pytest.raises(ConfigError, match=r"not for that name, but for fed\.example\.org, localhost"):
            check_server_certificate(f"intranet:{port}", directory / "ca.crt")


def test_what_speaks_no_tls_or_is_not_there(directory: Path):
    with serving(directory, tls=False) as address, pytest.raises(ConfigError, match="does not speak TLS"):
        check_server_certificate(address, directory / "ca.crt")
    with pytest.raises(RunFailed, match="nothing answers at"):
        check_server_certificate(address, directory / "ca.crt")
    with pytest.raises(ConfigError, match=r"server's ca\.crt"):
        check_server_certificate(address, directory / "none.crt")
