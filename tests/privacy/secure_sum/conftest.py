"""A secure sum in one process: clients, and a server that may say what it likes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlab.privacy.ledger.keys import public_hex
from fedlab.privacy.secure_sum.coordinator import Coordinator
from fedlab.privacy.secure_sum.keys import new_private, public_of, signed_cipher_key
from fedlab.privacy.secure_sum.masking import add
from fedlab.privacy.secure_sum.participant import Prepared, confirmed, masked, prepare, revealed
from fedlab.protocol.sum_messages import SumSetting

RUN = "a" * 32


@dataclass
class Sum:
    """A sum of ``count`` clients, prepared."""

    count: int
    survivors: int
    colluding: int = 0
    run: str = RUN
    name: str = "round-1-0"
    identities: dict[str, Ed25519PrivateKey] = field(default_factory=dict)
    ciphers: dict[str, bytes] = field(default_factory=dict)
    prepared: dict[str, Prepared] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clients = [f"client-{i}" for i in range(self.count)]
        self.identities = self.identities or {c: Ed25519PrivateKey.generate() for c in self.clients}
        self.ciphers = self.ciphers or {c: new_private() for c in self.clients}
        self.keys = {
            c: signed_cipher_key(self.identities[c], self.run, c, public_of(self.ciphers[c])) for c in self.clients
        }
        participants = {c: public_hex(self.identities[c]) for c in self.clients}
        setting = SumSetting(self.name, self.survivors, self.colluding, participants)
        self.server = Coordinator(self.run, setting, self.keys)
        for c in self.clients:
            self.prepared[c] = prepare(self.identities[c], self.ciphers[c], self.run, c, self.server.plan([c]))
            assert self.server.accept(self.prepared[c].reply) is None

    def mask(self, client: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return masked(self.prepared[client], self.server.order([client]), values)

    def confirm(self, clients: Collection[str], dropped: Collection[str]) -> dict[str, str]:
        return {c: confirmed(self.identities[c], self.prepared[c], dropped) for c in clients}

    def reveal(self, client: str, dropped: Collection[str], confirmations: Mapping[str, str]) -> dict[str, str]:
        sealed = self.server.unmask_order(client).sealed
        return revealed(self.ciphers[client], self.prepared[client], dropped, confirmations, sealed)

    def total(self, sent: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        total: dict[str, np.ndarray] = {}
        for values in sent.values():
            total = add(total, values)
        return total


@pytest.fixture
def sums() -> Any:
    """``Sum`` for tests that import nothing relative."""
    return Sum
