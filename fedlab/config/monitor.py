"""[metrics] and [log] of a server's and of a client's own file: what is seen from outside."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedlab.config.base import Section


class MetricsSection(Section):
    """[metrics]: a Prometheus endpoint."""

    address: str | None = Field(default=None, description='host:port, for example "127.0.0.1:9464"; default: none')


class LogSection(Section):
    """[log]: how lines of the log are written."""

    format: Literal["plain", "json"] = Field(default="plain", description="lines for people, or one JSON object each")
