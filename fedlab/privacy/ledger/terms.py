"""What an owner signs before a run: the terms of a PLAN line, as ``docs/ledger.md`` fixes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from fedlab.privacy.accounting import Event
from fedlab.privacy.ledger.ledger import event_fields

TERMS = (
    "unit",
    "relation",
    "event",
    "clip",
    "normaliser",
    "delta",
    "n",
    "participations",
    "scope",
    "budget",
    "noise",
    "content",
    "configuration",
    "releases",
    "shared",
)


def scope_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """SHA-256 of the trained tensors' names and shapes: what one clip covers."""
    return hashlib.sha256(
        "\n".join(f"{name}:{tuple(shape)}" for name, shape in sorted(shapes.items())).encode()
    ).hexdigest()


def budget_terms(limit: float, delta: float) -> dict[str, str]:
    """A budget (ε, δ) as a plan holds it."""
    return {"epsilon": float(limit).hex(), "delta": float(delta).hex()}


def plan_terms(
    event: Event, *, unit: str, clip: float, normaliser: float, delta: float, n: int, participations: int, noise: str
) -> dict[str, Any]:
    """What a plan object knows of the terms; ``scope``, ``budget``, ``content`` and, where noise is shared, ``shared``
    are the owner's to add, ``run_terms`` the run's.

    Args:
        event: one round's.
        unit: "example" or "client".
        clip: joint L2 norm C.
        normaliser: what a noised sum is divided by.
        delta: δ.
        n: records of the owner, or clients.
        participations: rounds at most.
        noise: "seeded" or "secure".
    """
    return {
        "unit": unit,
        "relation": "add_remove",
        "event": event_fields(event),
        "clip": float(clip).hex(),
        "normaliser": float(normaliser).hex(),
        "delta": float(delta).hex(),
        "n": n,
        "participations": participations,
        "noise": noise,
        "shared": None,
    }


def run_terms(configuration: str, releases: Iterable[str]) -> dict[str, Any]:
    """What the configuration knows of the terms.

    Args:
        configuration: SHA-256 of the resolved TOML.
        releases: names of all that leaves without noise (``fedlab.privacy.release``).
    """
    return {"configuration": configuration, "releases": sorted(releases)}
