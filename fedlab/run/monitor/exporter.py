"""A small HTTP endpoint: ``/metrics`` for Prometheus, ``/health`` (the process lives), ``/ready`` (it can do work now).

It has neither TLS nor passwords, so it stays on loopback unless its owner says otherwise; whoever wants it elsewhere
puts a proxy before it.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from fedlab.config.monitor import host_and_port
from fedlab.errors import ConfigError

logger = logging.getLogger("fedlab")
KEY = "metrics.address"
EXAMPLE = "127.0.0.1:9464"
POLL = 0.1  # seconds after which a close is noticed
Ready = Callable[[], str | None]


class Exporter:
    """The endpoint, from its making until it is closed; also as a context manager.

    Args:
        address: ``host:port``, such as ``127.0.0.1:9464`` or ``[::1]:9464``; port 0 takes a free one.
        figures: what ``/metrics`` shows.
        ready: gives why no work can be done now, None if it can. Whoever connects reads it.
        exposed: listen on an address that other machines reach.

    Raises:
        ConfigError: an address that is none, is not this machine's or is taken, or is not loopback without ``exposed``.
    """

    def __init__(
        self, address: str, figures: Iterable[Collector], ready: Ready = lambda: None, exposed: bool = False
    ) -> None:
        registry = CollectorRegistry()
        for collector in figures:
            registry.register(collector)
        family, host, port = _resolved(address)
        if not (exposed or ipaddress.ip_address(host).is_loopback):
            raise ConfigError(
                f'{KEY} = "{address}": other machines reach this address, and the endpoint asks nobody for a password;'
                f' use "127.0.0.1:{port or 9464}", or set metrics.exposed = true on a network of your own'
            )
        try:
            self._server = _server(family, host, port, _application(make_wsgi_app(registry), ready))
        except OSError as error:
            raise ConfigError(f'{KEY} = "{address}": {_advice(error)}') from None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """``host:port`` on which it listens."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def close(self) -> None:
        """Stop answering and give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Exporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _resolved(address: str) -> tuple[socket.AddressFamily, str, int]:
    try:
        host, port = host_and_port(address)
    except ValueError as error:
        raise ConfigError(f"{KEY}: {error}") from None
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise ConfigError(
            f'{KEY} = "{address}": the name {host!r} is not known here; give an address, for example "{EXAMPLE}"'
        ) from None
    return family, str(where[0]), port


def _advice(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the port is taken by another process; stop it, or choose another port"
        case errno.EADDRNOTAVAIL:
            return f'this machine has no such address; for example "{EXAMPLE}"'
        case errno.EACCES:
            return "this user may not listen there; choose a port from 1024 on"
        case _:
            return f"cannot listen there: {error.strerror}"


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds in which a request must have come

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: scrapes are no events."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind, without asking a name server for this machine's name as ``http.server`` does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: whoever hung up does not read it, and a traceback is not for the terminal."""


def _server(family: socket.AddressFamily, host: str, port: int, application: WSGIApplication) -> _Server:
    kind = type("Server", (_Server,), {"address_family": family})
    server: _Server = kind((host, port), _Handler)
    server.set_app(application)
    return server


def _application(metrics: WSGIApplication, ready: Ready) -> WSGIApplication:
    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start_response)
        status, text = _answer(environ["REQUEST_METHOD"], path, ready)
        body = f"{text}\n".encode()
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    return application


def _answer(method: str, path: str, ready: Ready) -> tuple[str, str]:
    if path not in ("/health", "/ready"):
        return "404 Not Found", "/metrics, /health and /ready are here"
    if method not in ("GET", "HEAD"):
        return "405 Method Not Allowed", "use GET"
    if path == "/health":
        return "200 OK", "alive"
    try:
        problem = ready()
    except Exception:  # whoever asks is told that no work can be done, not why looking failed
        logger.exception("whether work can be done could not be found out")
        problem = "its state is not known; see the log"
    return ("200 OK", "ready") if problem is None else ("503 Service Unavailable", f"not ready: {problem}")
