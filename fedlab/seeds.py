"""Every random choice of a run comes from a named stream, so that it depends on nothing else.

A stream is named by (run seed, purpose, client, round, ...). Neither the number of nodes, nor cohort grouping, nor
arrival order can move a draw from one stream to another. Not for privacy noise that must stay secret: see
``fedlab.privacy.noise``.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_seed(seed: int, purpose: str, *names: str | int) -> int:
    """256-bit integer that names one stream (SHA-256 of its parts; parts cannot run into each other)."""
    parts = [str(seed), purpose, *map(str, names)]
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def random_stream(seed: int, purpose: str, *names: str | int) -> np.random.Generator:
    """Independent numpy generator (Philox) for one purpose, e.g. ``random_stream(7, "noise", "client-3", 12)``."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(stream_seed(seed, purpose, *names))))


def torch_stream(seed: int, purpose: str, *names: str | int) -> torch.Generator:
    """torch's generator (on the CPU) for one purpose; of another distribution than ``random_stream`` of these names."""
    import torch  # configuration needs streams and no torch

    return torch.Generator().manual_seed(stream_seed(seed, purpose, *names) % 2**63)


def client_order(client: str) -> tuple[int, str]:
    """Sort key of client ids: client-2 before client-10. Every sum over clients runs in this order."""
    return len(client), client
