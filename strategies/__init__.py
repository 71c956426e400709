"""Server side: how the clients' updates become one model. ``STRATEGIES`` maps ``strategy.name`` to its class."""

from __future__ import annotations

from strategies.base import LoraStrategy
from strategies.fedavg import FedAvg
from strategies.fedsvd import FedSVD
from strategies.ffa import FFALora
from strategies.head import HeadOnly

STRATEGIES: dict[str, type[LoraStrategy]] = {
    "fedavg": FedAvg,
    "ffa": FFALora,
    "fedsvd": FedSVD,
    "head": HeadOnly,
}

__all__ = ["STRATEGIES", "LoraStrategy"]
