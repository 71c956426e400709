"""What a run claims of its privacy, from nothing but what was charged: the numbers in ``result.json``.

The server makes them at the run's end or when it is cut off, ``fedlab audit`` makes them again from the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlab.config import RunConfig
from fedlab.privacy.accounting import DISCRETE, Event
from fedlab.privacy.ledger.ledger import Entry, charged, event_fields, events
from fedlab.privacy.ledger.spending import PrivacySpent, exact, summary
from fedlab.privacy.promise import NO_DP, accountant


def privacy_claims(
    config: RunConfig,
    run: str,
    ledgers: Mapping[str, Sequence[Entry]],
    deltas: Mapping[str, float],
    unseen: Mapping[str, Sequence[Event]],
) -> dict[str, Any]:
    """``epsilon``, its median, the accountant, and per client ε in all and of earlier runs, δ, and what was charged.

    Args:
        config: of the run.
        run: its id.
        ledgers: client → the lines that show what its data was charged (with unit ``client`` the server's).
        deltas: client → δ, for every client of the run.
        unseen: client → what it was asked for, or sent, while its ledger does not show it; counted as spent.
    """
    if not config.private:
        return {"epsilon": NO_DP, "epsilon_median": NO_DP, "accountant": NO_DP, "noise": NO_DP, "clients": {}}
    spent = PrivacySpent(deltas)
    for client in deltas:
        spent.record(client, events(ledgers.get(client, [])))
        for event in unseen.get(client, ()):
            spent.assume(client, event)
    epsilons = spent.epsilons()
    clients: dict[str, dict[str, Any]] = {}
    for client, delta in deltas.items():
        entries = ledgers.get(client, [])
        before = exact(events(e for e in entries if e["run"] != run), delta)
        clients[client] = {"epsilon": epsilons[client], "epsilon_before": before, "delta": delta}
        if config.privacy.unit == "example":
            clients[client]["participations"] = len(charged(entries, run))
        if unseen.get(client):
            clients[client]["unseen"] = [event_fields(event) for event in unseen[client]]
    discrete = any(e.sampler == DISCRETE for entries in ledgers.values() for e in events(entries))
    worst = summary(epsilons) if epsilons else {"max": 0.0, "median": 0.0}
    return {
        "epsilon": worst["max"],
        "epsilon_median": worst["median"],
        "accountant": accountant(config, discrete),
        "noise": config.privacy.noise,
        "clients": clients,
    }
