"""The server optimiser's moments as a part of a strategy's ``server_state``: ``first/<name>`` and ``second/<name>``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedlab.lora.server_optimizer import Moments
from fedlab.lora.state import State

FIRST, SECOND = "first/", "second/"


def moments_of(server_state: Mapping[str, Tensor]) -> Moments:
    """The moments in a server's state; empty before the first round."""
    return Moments(_under(FIRST, server_state), _under(SECOND, server_state))


def with_moments(server_state: Mapping[str, Tensor], moments: Moments) -> dict[str, Tensor]:
    """The server's state with these moments in place of its own."""
    others = {name: value for name, value in server_state.items() if not name.startswith((FIRST, SECOND))}
    first = {FIRST + name: value for name, value in moments.first.items()}
    return others | first | {SECOND + name: value for name, value in moments.second.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> State:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
