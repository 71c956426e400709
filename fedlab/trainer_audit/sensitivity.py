"""Checks of what one record can do: to the clipped sum at most C, and to the update by no other way than that sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedlab.trainer_audit.findings import SLACK, failing
from fedlab.trainer_audit.observation import Observation, Records, Subject, clipped_gradient, observe

SHORT = "of norm 0.5·C"  # an adversary that clipping leaves alone, so that its effect is known
LONG = "of norm 1000·C"


def _adversaries(who: Subject, clip: float) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Whole gradients of one record, each of another kind."""
    generator = torch.Generator().manual_seed(0)
    direction = {name: torch.randn(who.state[name].shape, generator=generator) for name in who.names}
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in direction.values()))

    def scaled(length: float) -> dict[str, Tensor]:
        return {name: value * (length / norm) for name, value in direction.items()}

    yield SHORT, scaled(0.5 * clip)
    yield LONG, scaled(1000 * clip)
    yield "of norm 1e30, whose square overflows float32", scaled(1e30)
    for label, bad in (("NaN", math.nan), ("inf", math.inf)):
        gradient = scaled(1000 * clip)
        gradient[who.names[0]].view(-1)[0] = bad
        yield f"of norm 1000·C with one {label}", gradient


def sensitivity(who: Subject, findings: list[str]) -> None:
    """Run twice with the same noise; only one record differs: present, zeroed out, or absent."""
    clip, text = who.plan(1, 1, 1).clip, int(who.session.data.train(who.client)[0])
    count = 12
    one = np.zeros(count + 1, dtype=np.int64)
    others = np.append(
        np.full(count, 10 * clip), 0.0
    )  # the others all pull the same way: their share shows if it is rescaled
    records = Records(text, np.array([], dtype=np.int64), one, one, others)
    plan = replace(who.plan(records.count, records.count, 1), noise="seeded")  # shared noise needs a seed
    neighbours: dict[str, Observation] = {}
    with failing("", findings):
        neighbours["zeroed out"] = observe(who, records, plan)
        neighbours["removed"] = observe(who, records, replace(plan, absent=count))
    for label, gradient in _adversaries(who, clip):
        with failing(f"with a gradient {label}, ", findings):
            present = observe(who, replace(records, dense={count: gradient}), plan)
            for change, without in neighbours.items():
                moved, tolerance = _distance(present, without)
                if label == SHORT and change == "zeroed out" and not moved >= (0.5 - SLACK) * clip - tolerance:
                    findings.append(
                        f"a record with a gradient {label} moves the clipped sum by {moved / clip:.4g}·C only: these"
                        " checks see nothing"
                    )
                if not moved <= clip * (1 + SLACK) + tolerance:
                    findings.append(
                        f"a record with a gradient {label} moves the clipped sum by {moved / clip:.4g}·C when it is"
                        f" {change}"
                    )
    with failing("over several steps, ", findings):
        several, spiked = (
            plan.of_steps(3),
            replace(records, size=np.append(others[:-1], 1000 * clip)),
        )  # where steps are recorded
        runs = observe(who, records, several, scale=0.01), observe(who, spiked, several, scale=0.01)
        for step, (without, present) in enumerate(zip(*(run.log.released for run in runs), strict=True), start=1):
            if not (moved := math.dist(without, present)) <= clip * (1 + SLACK) + _distance(*runs)[1]:
                findings.append(
                    f"in step {step}, a record with a gradient {LONG} moves the clipped sum by {moved / clip:.4g}·C"
                )
    _real_record(who, findings)


def _real_record(who: Subject, findings: list[str]) -> None:
    """A real example among others: its contribution is its own clipped gradient as plain autograd gives it, and nothing
    else's.
    """
    real = who.session.data.train(who.client)[:6]
    norms = [clipped_gradient(who, int(position), math.inf)[1] for position in real]
    slack = SLACK if who.config.run.dtype == "float32" else 0.05  # 16-bit activations depend on how a batch is padded
    for label, clip in (("unclipped", 4 * max(norms)), ("clipped", 0.25 * float(np.median(norms)))):
        if not 0 < clip < math.inf:
            continue
        records = Records(int(real[0]), real, *(np.array([], dtype=np.int64),) * 2, np.array([]))
        plan = replace(who.plan(len(real), len(real), 1, clip=clip), noise="seeded")
        with failing(f"with a real record, {label}, ", findings):
            present, removed = observe(who, records, plan), observe(who, records, replace(plan, absent=0))
            moved, tolerance = _distance(present, removed)
            if not moved <= clip * (1 + slack) + tolerance:
                findings.append(f"a real record, {label}, moves the clipped sum by {moved / clip:.4g}·C")
            expected, _ = clipped_gradient(who, int(real[0]), clip)
            gap = math.dist(present.flat() - removed.flat(), _flat(expected))
            if not gap <= slack * clip + tolerance:
                findings.append(
                    f"a real record, {label}, contributes something else than its clipped gradient: off by"
                    f" {gap / clip:.4g}·C"
                )


def post_processing(who: Subject, findings: list[str]) -> None:
    """Momentum, AdamW, weight decay and prox must work on the noised gradient alone: privatise is blinded, and one
    record changes.
    """
    clip, text = who.plan(1, 1, 1).clip, int(who.session.data.train(who.client)[0])
    plan = replace(who.plan(8, 8, 3), noise="seeded", blind=True)
    gradient = dict(_adversaries(who, clip))[LONG]
    with failing("", findings):
        without, present = (
            observe(who, replace(Records.zeros(text, 8), dense=dense), plan, as_configured=True)
            for dense in ({}, {7: gradient})
        )
        if extra := without.update.keys() ^ set(who.names):
            findings.append(
                f"the update should hold the trained tensors and nothing else; {sorted(extra)[0]} is one too many or"
                " too few"
            )
        for name in who.names:
            if not torch.equal(without.update[name], present.update[name]):
                gap = float((without.update[name] - present.update[name]).abs().max())
                findings.append(
                    f"{name}: the update depends on a record by another way than what privatise returned (by up to"
                    f" {gap:.2g})"
                )


def _distance(a: Observation, b: Observation) -> tuple[float, float]:
    """‖a − b‖ of the released sums, and what float32 rounding of the weights may add to it."""
    rounding = 2.0**-22 * (float(np.linalg.norm(a.flat())) + math.sqrt(len(a.flat())) * a.plan.normaliser / a.lr)
    return math.dist(a.flat(), b.flat()), rounding


def _flat(tensors: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([value.double().flatten().cpu().numpy() for _, value in sorted(tensors.items())])
