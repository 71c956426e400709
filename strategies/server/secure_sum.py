"""The server's part in a secure sum (interfaces)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np
from flwr.serverapp import Grid

from fedlab.config import RunConfig
from fedlab.protocol.messages import SumOrder
from strategies.server.federation import Federation

Purpose = Literal["round", "gram"]


class SecureSum:
    """One secure sum after another, of the clients that are drawn for them.

    ``prepare``, then requests that carry ``order(...)``, then ``unmask`` with what came; its ``following`` prepares the
    next sum in the same exchange. Clients' keys come from their enrolment (``Federation.sum_keys``).
    """

    def __init__(self, grid: Grid, config: RunConfig, federation: Federation, survivors: int, colluding: int) -> None:
        raise NotImplementedError

    def prepare(self, purpose: Purpose, number: int, drawn: Collection[str]) -> list[str]:
        """The clients of the sum, prepared: of ``drawn`` those that answered. Empty if they are fewer than survivors.

        Whatever was prepared by ``unmask(..., following)`` for these very clients is used without an exchange.
        """
        raise NotImplementedError

    def order(self, clients: Iterable[str]) -> SumOrder:
        """What goes with the request to a node that answers for these clients."""
        raise NotImplementedError

    def unmask(
        self,
        total: Mapping[str, np.ndarray],
        inside: Collection[str],
        following: tuple[Purpose, int, Collection[str]] | None = None,
    ) -> dict[str, np.ndarray] | None:
        """The sum of what the clients ``inside`` masked, whose masked values add up to ``total``; None if too few
        clients are in it, confirmed it or revealed.
        """
        raise NotImplementedError
