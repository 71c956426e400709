"""The server's and the clients' apps, and the strategies, by reference: the library imports neither."""

from __future__ import annotations

import importlib
from typing import Any

SERVER_APP, CLIENT_APP, STRATEGIES = "strategies.app:app", "clients.app:app", "strategies:STRATEGIES"


def load_reference(reference: str) -> Any:
    """``"module:attribute"`` → the object, as Flower itself names apps."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
