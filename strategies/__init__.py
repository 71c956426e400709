"""How the clients' updates become one model. ``STRATEGIES`` maps ``strategy.name`` to its class."""

from __future__ import annotations

from strategies.base import Strategy
from strategies.fed_sb import FedSB
from strategies.fedavg import FedAvg
from strategies.fedex import FedEx
from strategies.fedsa import FedSA
from strategies.fedsvd import FedSVD
from strategies.fedsvd_continual import FedSVDContinual
from strategies.ffa import FFALora
from strategies.flexlora import FlexLora
from strategies.flora import FLora
from strategies.full import FullFineTuning
from strategies.head import HeadOnly
from strategies.hetlora import HetLora
from strategies.lora_fair import LoraFair
from strategies.o_lora import OLoRA
from strategies.osft import OSFT
from strategies.osft_data import OSFTData
from strategies.rolora import RoLora

AGGREGATORS: dict[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "ffa": FFALora,
    "fedsvd": FedSVD,
    "fedex": FedEx,
    "flora": FLora,
    "flexlora": FlexLora,
    "hetlora": HetLora,
    "lora-fair": LoraFair,
    "rolora": RoLora,
    "fedsa": FedSA,
    "fed-sb": FedSB,
    "head": HeadOnly,
}
CONTINUAL: dict[str, type[Strategy]] = {
    "osft": OSFT,
    "osft-data": OSFTData,
    "fedsvd-continual": FedSVDContinual,
    "o-lora": OLoRA,
    "full": FullFineTuning,
}
STRATEGIES = AGGREGATORS | CONTINUAL

__all__ = ["AGGREGATORS", "CONTINUAL", "STRATEGIES", "Strategy"]
