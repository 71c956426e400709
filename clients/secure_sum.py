"""A client's part in secure sums, kept on its disk (interfaces)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from clients.node import Node
from clients.owner import Owner
from fedlab.protocol.messages import (
    ConfirmReply,
    ConfirmRequest,
    PrepareReply,
    PrepareRequest,
    SumKey,
    SumOrder,
    UnmaskReply,
    UnmaskRequest,
)


def sum_key(owner: Owner, run: str) -> SumKey:
    """A client's key of this run's sums, signed; goes with its enrolment."""
    raise NotImplementedError


def answer_prepare(node: Node, request: PrepareRequest) -> PrepareReply:
    """Every client's fresh key and sealed shares."""
    raise NotImplementedError


def hide(owner: Owner, values: Mapping[str, np.ndarray], run: str, order: SumOrder) -> dict[str, np.ndarray]:
    """The values (int64, modulo 2⁶⁴) under this client's masks of the sum ``order``, once.

    Raises PrivacyError where nothing was prepared for it, or something else was masked in this sum before.
    """
    raise NotImplementedError


def answer_confirm(node: Node, request: ConfirmRequest) -> ConfirmReply:
    """Every client's signature of who dropped out."""
    raise NotImplementedError


def answer_unmask(node: Node, request: UnmaskRequest) -> UnmaskReply:
    """Every client's shares, one of each neighbour, once."""
    raise NotImplementedError
