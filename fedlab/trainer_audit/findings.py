"""What every mechanism check shares: sentences about what is wrong, and when a statistic is believed to say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fedlab.errors import FedlabError
from fedlab.trainer_audit.observation import PREFIX, RecordedPlan, Subject

Findings = dict[str, list[str]]  # check → sentences; empty lists where all is well
ALARM = 1e-7  # p below which a correct build is not believed
SLACK = 1e-3  # relative, for float32 gradients and weights
DENSE = (300, 30, 10)  # records, expected batch, steps: three runs (two rounds, two clients) for noise and sampling
SPARSE = (20, 0.5, 25)  # three batches in five are empty; that none is has probability 1e-10


@contextmanager
def failing(label: str, findings: list[str]) -> Iterator[None]:
    """A run that breaks is a finding: whether it breaks may depend on one record."""
    try:
        yield
    except (FedlabError, RuntimeError, ValueError) as error:
        findings.append(f"{label}training failed: {error}")


def accounted_std(plan: RecordedPlan) -> float:
    """The noise that is accounted for: σ of the event, not of the plan."""
    return plan.event().sigma * plan.clip


def by_tensor(who: Subject, steps: np.ndarray) -> dict[str, np.ndarray]:
    """[steps, joined prefixes] → tensor → [steps, its prefix]."""
    edges = np.cumsum(np.minimum(who.sizes, PREFIX))[:-1]
    return dict(zip(who.names, np.split(steps, edges, axis=1), strict=True))
