"""The front, as an application and without processes: what it passes on, and what it never does."""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedlab.run.launch.deploy import keys
from fedlab.run.launch.deploy.front import PASSED, Doorkeeper, Front

PULL = "/v1/fleet/pull-messages"


class Inner(httpx.AsyncBaseTransport):
    """Stands for the SuperLink: notes what reaches it."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.down = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.down:
            raise httpx.ConnectError("down")
        self.got.append((request.url.path, dict(request.headers), await request.aread()))
        headers = {"content-type": "application/x-protobuf", "set-cookie": "a=b", "server": "uvicorn"}
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(b"reply"))


class House:
    """A front with one node let in, and requests that it may have signed."""

    def __init__(self, folder: Path, most: int = 1000, insecure: bool = False) -> None:
        private, public = keys.make_node("north", folder)
        self.key: Any = serialization.load_ssh_private_key(private.read_bytes(), None)
        node = keys.NodeKey("north", keys.read_public_key(public))
        self.inner = Inner()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.doorkeeper = Doorkeeper([node])
        self.front = Front("https://inner", context, None if insecure else self.doorkeeper, most)
        self.front._client = httpx.AsyncClient(transport=self.inner)

    def signed(self, late: float = 0.0, key: Any = None) -> dict[str, str]:
        stamp = (now() - timedelta(seconds=late)).isoformat()
        return {
            "flwr-public-key": b64encode(public_key_to_bytes(self.key.public_key())).decode(),
            "flwr-timestamp": stamp,
            "flwr-signature": b64encode(sign_message(key or self.key, stamp.encode())).decode(),
        }

    def ask(self, method: str, path: str, content: Any = b"", **headers: str) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.front)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="https://front") as client:
                request = client.build_request(method, "https://front/", content=content, headers=headers)
                request.url = request.url.copy_with(raw_path=path.encode())
                return await client.send(request)

        return asyncio.run(go())


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_signed_request_passes_with_named_headers_alone(house: House):
    sent = house.signed() | {"flwr-task-token": "t", "flwr-superexec-signature": "s", "cookie": "c"}
    reply = house.ask("POST", PULL, b"body", **sent)
    assert (reply.status_code, reply.content) == (200, b"reply")
    assert "set-cookie" not in reply.headers
    ((path, headers, body),) = house.inner.got
    assert (path, body) == (PULL, b"body")
    assert {"flwr-task-token", "flwr-superexec-signature", "cookie"}.isdisjoint(headers)
    assert headers["flwr-signature"] == sent["flwr-signature"]
    assert "content-encoding" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-task-input",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "//v1/control/start-run",
        "/V1/fleet/pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_nothing_else_passes_even_when_signed(house: House, path: str):
    assert house.ask("POST", path, **house.signed()).status_code == 404
    assert house.inner.got == []


def test_only_posts_pass(house: House):
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert house.ask(method, PULL, **house.signed()).status_code == 404
    assert house.inner.got == []


def test_paths_are_those_that_flower_has():
    from flwr.superlink.routers.fleet.router import router

    known = {route.path for route in router.routes}  # type: ignore[attr-defined]
    assert PASSED | {"/v1/fleet/register-node", "/v1/fleet/unregister-node"} == known


def test_who_is_not_let_in_is_refused_before_its_body_is_read(house: House, tmp_path: Path):
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("a body was read")
        yield b""

    stranger = House(tmp_path / "stranger")
    for headers, told in (
        (stranger.signed(), f"it knows no key {keys.fingerprint(stranger.key.public_key())}: give its NAME.pub"),
        (house.signed(key=stranger.key), ""),  # the right key's name, signed with another
        (house.signed(late=1000), "its clock is 1000 s behind the server's"),  # or recorded a while ago
        (house.signed(late=-1000), "its clock is 1000 s ahead of the server's"),
        ({**house.signed(), "flwr-timestamp": "never"}, ""),
        ({}, ""),
    ):
        reply = house.ask("POST", PULL, never(), **headers)
        assert reply.status_code == (400 if told else 401)
        assert told in reply.text
    house.doorkeeper.let_in([])
    assert house.ask("POST", PULL, never(), **house.signed()).status_code == 400
    assert house.inner.got == []


def test_bodies_are_bounded_however_they_come(tmp_path: Path):
    house = House(tmp_path, most=100)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 10

    assert house.ask("POST", PULL, b"x" * 100, **house.signed()).status_code == 200
    assert house.ask("POST", PULL, b"x" * 101, **house.signed()).status_code == 413
    assert house.ask("POST", PULL, chunks(), **house.signed()).status_code == 413
    assert len(house.inner.got) == 1


def test_a_superlink_that_is_away_is_a_503_which_nodes_try_again(house: House):
    house.inner.down = True
    assert house.ask("POST", PULL, **house.signed()).status_code == 503
    assert house.ask("GET", "/health").status_code == 503


def test_health_needs_no_key_and_tells_nothing(house: House):
    reply = house.ask("GET", "/health")
    assert (reply.status_code, reply.content) == (200, b"")
    assert [path for path, _, _ in house.inner.got] == ["/health"]


def test_without_keys_nodes_register_themselves_and_the_rest_stays_shut(tmp_path: Path):
    house = House(tmp_path, insecure=True)
    assert house.ask("POST", "/v1/fleet/register-node").status_code == 200
    assert house.ask("POST", "/v1/control/start-run").status_code == 404
    assert house.ask("POST", "/v1/runtime/acquire-task").status_code == 404
