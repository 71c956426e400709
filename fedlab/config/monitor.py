"""[metrics] and [log] of a server's and of a client's own file: what is seen from outside."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fedlab.config.base import Section


class MetricsSection(Section):
    """[metrics]: a Prometheus endpoint."""

    address: str | None = Field(default=None, description='host:port, for example "127.0.0.1:9464"; default: none')
    exposed: bool = Field(
        default=False,
        description="the address may be one that other machines reach: the endpoint asks nobody for a password",
    )

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            host_and_port(value)
        return value


class LogSection(Section):
    """[log]: how lines of the log are written."""

    format: Literal["plain", "json"] = Field(default="plain", description="lines for people, or one JSON object each")


def host_and_port(address: str) -> tuple[str, int]:
    """``127.0.0.1:9464`` or ``[::1]:9464`` as host and port; port 0 takes a free one. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    number = int(port) if port.isascii() and port.isdigit() else 65536
    if not colon or not host or number > 65535 or (":" in host and not bracketed):
        raise ValueError(f'expected host:port, for example "127.0.0.1:9464", got {address!r}')
    return host[1:-1] if bracketed else host, number
