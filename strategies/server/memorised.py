"""Memorisation of a run's final model: measured by the server of a simulation, which holds all data anyway."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fedlab.config import RunConfig
from fedlab.evaluate.memorisation import Claim, asked, memorisation
from fedlab.models.adapters import initial_state
from fedlab.run.directory import jsonable
from strategies.server.heads import trained_names
from strategies.server.loop import Rounds

logger = logging.getLogger("fedlab")


def announced(config: RunConfig) -> list[str]:
    """What will be measured and what it takes, for the terminal before round 1."""
    settings, canaries, found = config.evaluate.membership, config.data.canaries, list[str]()
    if settings is not None:
        cost = f", {settings.references} reference models, each as long as one client's part in all rounds"
        found.append(
            f"memorisation: the losses of up to {2 * settings.pairs} records per client after the last round"
            + (cost if settings.references else "")
        )
    if canaries is not None:
        found.append(f"memorisation: the losses of {canaries.space} made-up secrets after the last round")
    return found


def memorised(rounds: Rounds, result: Mapping[str, Any]) -> dict[str, Any]:
    """``memorisation`` of ``result.json`` in a dictionary of its own; empty where nothing of it was asked for.

    ``result``: what ``result.json`` says of ε.
    """
    if not asked(rounds.session) or not rounds.done:
        return {}
    rounds.progress.note("measuring what was learnt by heart")
    session, config = rounds.session, rounds.config
    start = initial_state(session.model, config.lora, config.run.seed)
    found = memorisation(
        session,
        start,
        rounds.state,
        lambda number: trained_names(rounds.strategy, start, number),
        claim_of(config, result),
    )
    session.model.load(rounds.state)
    logger.info("memorisation: %s", found)
    told: dict[str, Any] = jsonable(found)
    return {"memorisation": told}


def claim_of(config: RunConfig, result: Mapping[str, Any]) -> Claim | None:
    """What a private run promises for one unit; None without DP."""
    deltas = [entry["delta"] for entry in result["clients"].values() if entry.get("delta") is not None]
    if not config.private or not deltas:
        return None
    return Claim(float(result["epsilon"]), max(deltas), config.privacy.unit)
