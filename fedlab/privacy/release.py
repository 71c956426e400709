"""What may leave a client, and what each of it costs: a DP event that was charged, or a sentence in the statement.

Formal guarantee: a ``Release`` of a private run is made in two ways only. ``protected`` takes the event that the
client's ledger was charged with before its data was touched; ``public`` takes a name that has a sentence here, and
``sentences`` prints it. Nothing else that depends on data has a place in a reply (``fedlab.protocol.messages``), but
that a client failed, and its code, which has a sentence here too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlab.config import RunConfig
from fedlab.errors import PrivacyError
from fedlab.privacy.accounting import Event
from fedlab.protocol.messages import EventFields, Release

SIZE, TIMING, FAILURE = "size", "timing", "failure"
UPDATE, METRICS, SCORES, GRAM = "update", "training-metrics", "scores", "gram"
NOISED_SCORES = "noised-scores"  # never public: charged, or not released

# name → what the statement says of a release that no noise protects
PUBLIC = {
    SIZE: "the numbers of records of the clients (they are the weights)",
    TIMING: "who took part in which round, how many steps it made, and how long it took",
    FAILURE: (
        "whether a client failed or refused, and which of a fixed list of codes it gave for it, which may depend on its"
        " records"
    ),
    UPDATE: "each client's update as it is, to the server",
    METRICS: "**training loss and clip fraction, which `privacy.share_metrics` sent without noise**",
    SCORES: "**scores on the clients' own held-out records, which `privacy.share_metrics` sent without noise**",
    GRAM: "which inputs a task used, as a sum over clients without noise",
}


def public(
    name: str, numbers: Mapping[str, float] | None = None, arrays: Mapping[str, np.ndarray] | None = None
) -> Release:
    """A release that no noise protects. Raises PrivacyError for a name that has no sentence in the statement."""
    if name not in PUBLIC:
        raise PrivacyError(
            f"release {name!r} has no sentence in the statement and no DP event; it stays with its owner"
        )
    return Release(name, dict(arrays or {}), dict(numbers or {}))


def protected(name: str, event: Event, arrays: Mapping[str, np.ndarray]) -> Release:
    """A release that ``event`` was charged for."""
    return Release(name, dict(arrays), event=fields_of(event))


def fields_of(event: Event) -> EventFields:
    """A DP event as it travels."""
    return EventFields(event.sampler, event.q, event.sigma, event.steps)


def event_of(fields: EventFields) -> Event:
    """Inverse of ``fields_of``."""
    return Event(fields.sampler, fields.q, fields.sigma, fields.steps)


def public_names(config: RunConfig) -> list[str]:
    """The public releases that a run makes under this configuration: all that leaves a client without a charge."""
    names = [SIZE, TIMING, FAILURE]
    if config.privacy.unit != "example":
        names.append(UPDATE)
    if config.privacy.share_metrics or not config.private:
        names += [METRICS, SCORES]
    if config.gram is not None and config.privacy.unit != "example":
        names.append(GRAM)
    return names


def sentences(config: RunConfig) -> list[str]:
    """What the statement says of each of them."""
    return [PUBLIC[name] for name in public_names(config)]
