"""The front: the one port of a server that others reach. It passes on what nodes need, and nothing else.

Flower serves its fleet, control and runtime interfaces on one port, and reads a request's body before it knows who
sent it. So a proxy stands before it: it knows the requests of nodes by their exact paths, holds the sender's signature
against the keys that are let in before it reads a body, bounds that body, passes on named headers alone, and answers
404 to everything else.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import logging
import ssl
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import httpx
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedlab.run.launch.deploy.keys import NodeKey, fingerprint
from fedlab.run.launch.deploy.superlink import flower_bytes

PASSED = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "send-node-heartbeat",
    )
)
SELF_REGISTERED = frozenset({"/v1/fleet/register-node", "/v1/fleet/unregister-node"})  # nodes without keys only
HEADERS = frozenset(
    name.encode()
    for name in (
        "accept",
        "content-type",
        "flwr-component-name",
        "flwr-package-name",
        "flwr-package-version",
        FLEET_HTTP_PUBLIC_KEY_HEADER,
        FLEET_HTTP_SIGNATURE_HEADER,
        TIMESTAMP_HEADER,
    )
)
BACK = frozenset({b"content-type", b"content-length", b"flwr-version-incompatibility-message"})
# What a node is told. The status goes with it: at 401 Flower's nodes end without a word, at 400 they print it.
NOT_LET_IN = "the server does not let this node in; it knows no key"
WRONG_CLOCK = "the server cannot tell old requests from new ones"
STALL_SECONDS = 60.0  # without a byte of a body
INNER_SECONDS = 120.0
TOLD_AGAIN_SECONDS = 60.0  # between two lines on the same refusal
Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
logger = logging.getLogger("fedlab")


class Refused(Exception):
    """An answer that ends a request.

    Args:
        status: of HTTP.
        reason: for the log; empty: not worth a line.
        told: a sentence for the sender, where its owner can do something about it.
    """

    def __init__(self, status: int, reason: str = "", told: str = "") -> None:
        super().__init__(reason)
        self.status, self.told = status, told


@dataclass
class Seen:
    """What the front has passed on since it started."""

    requests: int = 0
    refused: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Doorkeeper:
    """Knows the nodes that are let in. ``keys`` may be replaced at any time."""

    def __init__(self, keys: Iterable[NodeKey] = ()) -> None:
        self._names: dict[bytes, str] = {}
        self.let_in(keys)

    def let_in(self, keys: Iterable[NodeKey]) -> None:
        """From now on these, and no others."""
        self._names = {flower_bytes(key): key.name for key in keys}

    def check(self, headers: Mapping[bytes, bytes]) -> str:
        """The name of the node that signed a request. Raises Refused."""
        try:
            pem = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
            signed_at = headers[TIMESTAMP_HEADER.encode()].decode("ascii")
            age = (now() - datetime.fromisoformat(signed_at)).total_seconds()
        except (KeyError, ValueError, TypeError, UnicodeError, binascii.Error):
            raise Refused(401, "a request without a node's signature") from None
        name = self._names.get(pem)
        if name is None:
            known = _fingerprint(pem)
            raise Refused(
                400,
                f"a node with an unknown key{known}; let it in with fedlab keys add",
                f"{NOT_LET_IN}{known}: give its NAME.pub to the coordinator (fedlab keys add)",
            )
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            text = f"clock is {abs(age):.0f} s {'behind' if age > 0 else 'ahead of'}"
            raise Refused(400, f"{name}: its {text} this one; set both", f"{WRONG_CLOCK}: its {text} the server's")
        if not verify_signature(bytes_to_public_key(pem), signed_at.encode("ascii"), signature):
            raise Refused(401, f"a request that bears the key of {name} and was not signed with it")
        return name


class Front:
    """The proxy, as an ASGI application.

    Args:
        inner: ``https://host:port`` of the SuperLink.
        context: trusts its certificate.
        doorkeeper: of nodes with keys; None: whoever comes is let in.
        most_bytes: largest body.
    """

    def __init__(self, inner: str, context: ssl.SSLContext, doorkeeper: Doorkeeper | None, most_bytes: int) -> None:
        self.seen = Seen()
        self._inner, self._context = inner, context
        self._doorkeeper, self._most = doorkeeper, most_bytes
        self._paths = PASSED if doorkeeper is not None else PASSED | SELF_REGISTERED
        self._client: httpx.AsyncClient | None = None
        self._health: tuple[float, int] = (-1.0, 503)
        self._told: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD") and not scope["query_string"]:
                await _answer(send, await self._healthy())
                return
            await self._pass(scope, receive, send)
        except Refused as refusal:
            self.seen.refused += 1
            self._tell(str(refusal), scope)
            await _answer(send, refusal.status, refusal.told)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["raw_path"].decode("ascii", "replace")
        if path not in self._paths or scope["method"] != "POST" or scope["query_string"]:
            raise Refused(404)
        headers = dict(scope["headers"])
        if self._doorkeeper is not None:
            self._doorkeeper.check(headers)
        length = headers.get(b"content-length", b"")
        if length and (not length.isdigit() or int(length) > self._most):
            raise Refused(413, f"a body of {length.decode('ascii', 'replace')[:20]} bytes; server.max_body bounds it")
        onward = [(name, value) for name, value in scope["headers"] if name in HEADERS]
        if length:
            onward.append((b"content-length", length))
        assert self._client is not None
        request = self._client.build_request("POST", self._inner + path, headers=onward, content=self._body(receive))
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise Refused(503, f"the SuperLink did not answer ({type(error).__name__})") from None
        self.seen.requests += 1
        try:
            await self._answer_with(response, send)
        finally:
            await response.aclose()

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        """The body as it comes. Raises Refused once it is too large, or stops coming."""
        total, more = 0, True
        while more:
            try:
                message = await asyncio.wait_for(receive(), STALL_SECONDS)
            except TimeoutError:
                raise Refused(408) from None
            if message["type"] == "http.disconnect":
                raise Refused(400)
            total += len(message.get("body", b""))
            if total > self._most:
                raise Refused(413, "a body that is larger than server.max_body")
            self.seen.bytes_in += len(message.get("body", b""))
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def _answer_with(self, response: httpx.Response, send: Send) -> None:
        headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() in BACK]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        try:
            async for chunk in response.aiter_raw():
                self.seen.bytes_out += len(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.HTTPError:
            return  # cut off; the node asks again
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _healthy(self) -> int:
        """Status of ``/health``: the SuperLink's, asked at most once a second."""
        asked, status = self._health
        if time.monotonic() - asked > 1 or asked < 0:
            assert self._client is not None
            try:
                status = 200 if (await self._client.get(f"{self._inner}/health", timeout=2)).is_success else 503
            except httpx.HTTPError:
                status = 503
            self._health = (time.monotonic(), status)
        return status

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        timeout = httpx.Timeout(INNER_SECONDS, connect=5)
        limits = httpx.Limits(max_connections=256)
        self._client = httpx.AsyncClient(
            verify=self._context,
            timeout=timeout,
            limits=limits,
            trust_env=False,
            headers={"accept-encoding": "identity"},
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    def _tell(self, reason: str, scope: Scope) -> None:
        """A line on a refusal, not again within a minute."""
        if not reason or time.monotonic() - self._told.get(reason, -TOLD_AGAIN_SECONDS) < TOLD_AGAIN_SECONDS:
            return
        if len(self._told) > 1000:
            self._told.clear()
        self._told[reason] = time.monotonic()
        logger.warning("refused, from %s: %s", (scope.get("client") or ("?",))[0], reason)


async def _answer(send: Send, status: int, told: str = "") -> None:
    """An answer of the front's own. A sentence goes where Flower's nodes look for one, and print it."""
    body = json.dumps({"code": 0, "detail": told}).encode() if told else b""
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _fingerprint(pem: bytes) -> str:
    try:
        return f" {fingerprint(bytes_to_public_key(pem))}"
    except Exception:  # whatever somebody sends for a key
        return ""
