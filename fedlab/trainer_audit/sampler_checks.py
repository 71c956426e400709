"""Checks of batches and steps: Poisson, anew in every step, and as many steps as are charged."""

from __future__ import annotations

import numpy as np

from fedlab.privacy.accounting import DISCRETE
from fedlab.trainer_audit import p_values
from fedlab.trainer_audit.findings import ALARM, SLACK, SPARSE, accounted_std
from fedlab.trainer_audit.observation import PREFIX, Observation


def sampler(runs: list[Observation], findings: list[str]) -> None:
    """Which records were read in which step, against independent coins of probability q."""
    event, n = runs[0].plan.event(), runs[0].plan.n
    if event.sampler not in ("poisson", DISCRETE):
        findings.append(f"batches are accounted for as {event.sampler!r}; only Poisson batches are known here")
    batches = [batch for run in runs for batch in run.log.positions]
    if any(len(np.unique(batch)) < len(batch) for batch in batches):
        findings.append("a record enters a batch more than once")
    if not batches:
        findings.append("no step was seen")
        return
    joined, steps, q = np.concatenate(batches), len(batches), event.q
    if (p := p_values.rate_p(len(joined), n * steps, q)) < ALARM:
        findings.append(
            f"a record is read with probability {len(joined) / (n * steps):.4g}, accounted for as {q:.4g} (p = {p:.1g})"
        )
    for label, counts, trials in (
        ("how often a record is read", np.bincount(joined, minlength=n), steps),
        ("the number of records in a batch", np.array([len(batch) for batch in batches]), n),
    ):
        ratio, p = p_values.dispersion(counts, trials, q)
        if p < ALARM:
            findings.append(f"{label} varies {ratio:.3g} times as much as under Poisson sampling (p = {p:.1g})")
    drawn = np.stack([np.bincount(batch, minlength=n) for batch in batches])
    shared = (drawn @ drawn.T)[np.triu_indices(steps, 1)]  # records that two batches have in common: Bin(n, q²)
    if shared.size and (p := p_values.overlap_p(int(shared.max()), n, q) * shared.size) < ALARM:
        findings.append(
            f"two batches share {shared.max()} of {n} records, where {n * q * q:.3g} are expected (p = {p:.1g})"
        )


def steps(label: str, run: Observation, findings: list[str]) -> None:
    """Optimiser steps, noise draws and charged steps are the same number, and the update is what those steps moved."""
    charged = run.plan.event().steps
    for what, count in (("optimiser steps", len(run.log.released)), ("noise draws", run.log.calls)):
        if count != charged:
            empty = ", some of whose batches are empty" if run.plan.n == SPARSE[0] else ""
            findings.append(f"{label}: {count} {what} for {charged} charged{empty}")
    if run.log.released:
        whole = np.concatenate([value.flatten()[:PREFIX].numpy() for _, value in sorted(run.released.items())])
        moved = np.sum(run.log.released, axis=0)
        rounding = charged * 2.0**-20 * (np.abs(whole).max() + run.plan.normaliser / run.lr)
        gap, std = float(np.abs(whole - moved).max()), accounted_std(run.plan)
        if gap > SLACK * std + rounding:
            findings.append(f"{label}: the update holds {gap / std:.3g}·σC that no optimiser step made")
