"""The empirical audit: put canaries through the real ``train_client`` and see how much ε an adversary can prove.

A canary is a record whose gradient is a spike of norm 10·C at one coordinate of its own (a Dirac canary: Nasr et al.,
arXiv 2302.07956; Steinke et al., arXiv 2305.08846, white box). It is in by a fair coin, else zeroed out. The adversary
sees the update and scores each canary by its coordinate. A lower bound above the claimed ε means that the software does
not do what is accounted for; a bound below it is no evidence that it does, because a one-run audit reaches about half
of the true ε even where every assumption holds.

The bug-finding setting (default) is q = 1, one step, σ = 1, where the Gaussian's trade-off curve is exact: claimed ε =
4.377 at δ = 1e-5.
``production=True`` keeps the client's q, σ, δ and steps; the GDP bounds are then approximations, and low: subsampling
hides canaries.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedlab._validate import positive
from fedlab.config import RunConfig
from fedlab.errors import FedlabError
from fedlab.lora.state import part_of
from fedlab.privacy.accounting import epsilon
from fedlab.seeds import random_stream
from fedlab.session import Session, open_session, torch_threads
from fedlab.trainer_audit.bounds import Bound, lower_bounds
from fedlab.trainer_audit.findings import Findings
from fedlab.trainer_audit.mechanism import check_mechanism
from fedlab.trainer_audit.observation import (
    DEFAULT_PARTS,
    Observation,
    RecordedPlan,
    Records,
    Subject,
    clipped_gradient,
    observe,
    subject,
)

SIZE = 10.0  # of a canary's gradient, in units of C: it is clipped, as an adversary's would be
REAL = 8  # real examples among the canaries
STEPS = 300  # of a production audit at most
SIGMA, DELTA = 1.0, 1e-5  # of the bug-finding setting


@dataclass(frozen=True)
class EmpiricalAudit:
    """What was audited, what was proven, and what is wrong.

    Report it as "ε ≥ 2.4 at 95 %, m = 2000, white box, q = 1".
    """

    bounds: tuple[Bound, ...]
    claimed: float  # ε of the event that the audited plan states
    delta: float
    canaries: int
    configuration: dict[str, Any]
    mechanism: Findings
    findings: tuple[str, ...]  # empty if nothing is wrong
    notes: tuple[str, ...]  # how the audit was cut down or approximated
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Only dicts, lists, strings, numbers and booleans: for JSON."""
        return {**asdict(self), "bounds": [asdict(b) | {"assumptions": list(b.assumptions)} for b in self.bounds]} | {
            "findings": list(self.findings),
            "notes": list(self.notes),
        }


def empirical_audit(
    config: RunConfig,
    canaries: int = 2000,
    seed: int = 0,
    production: bool = False,
    client: str | None = None,
    parts: Iterable[str] = DEFAULT_PARTS,
    confidence: float = 0.95,
) -> EmpiricalAudit:
    """Audit the trainer under ``config``: the three lower bounds, then ``check_mechanism``.

    Args:
        config: of a private run; model, data, clip, noise source and physical batch are used as they are.
        canaries: m >= 2, evenly over the trained parts and their tensors; no more than there are coordinates.
        seed: of coins, coordinates, initial weights and (if seeded) noise. A correct build exceeds the claim for at
        most
            1 − confidence of all seeds per bound.
        production: keep q, σ, δ and the steps of all participations (300 at most), instead of q = 1, σ = 1, one step.
        client: the first one unless named.
        parts: what is trained, among ``lora_A``, ``lora_B``, ``head``.
        confidence: of each bound by itself, in (0, 1).

    Raises ConfigError where the run is not private, or for an unknown client or part.
    """
    with torch_threads(config.run.threads):  # as in a run; short records would only make more threads wait
        return audit_session(open_session(config.to_toml()), canaries, seed, production, client, parts, confidence)


def audit_session(
    session: Session,
    canaries: int = 2000,
    seed: int = 0,
    production: bool = False,
    client: str | None = None,
    parts: Iterable[str] = DEFAULT_PARTS,
    confidence: float = 0.95,
) -> EmpiricalAudit:
    """See ``empirical_audit``; for a session that is open."""
    started = time.perf_counter()
    who = subject(session, client, seed, tuple(parts))
    bounds, plan, notes, failures = canary_bounds(who, canaries, seed, production, confidence)
    claimed = epsilon([plan.event()], plan.delta)
    checks = check_mechanism(session, who.client, seed, tuple(parts))
    above = [
        f"{bound.name}: ε >= {bound.epsilon:.4g} at {100 * confidence:g} % confidence, but {claimed:.4g} is claimed (δ"
        f" = {plan.delta:g})"
        for bound in bounds
        if bound.epsilon > claimed
    ]
    event = plan.event()
    configuration = {
        "client": who.client,
        "model": session.config.model.name,
        "parts": sorted({part_of(name) for name in who.names}),
        "coordinates": int(who.sizes.sum()),
        "production": production,
        "seed": seed,
        "q": event.q,
        "sigma": event.sigma,
        "steps": event.steps,
        "clip": plan.clip,
        "noise": plan.noise,
    }
    findings = (
        *failures,
        *above,
        *(f"{check}: {sentence}" for check, sentences in checks.items() for sentence in sentences),
    )
    m = bounds[0].canaries if bounds else 0
    return EmpiricalAudit(
        bounds, claimed, plan.delta, m, configuration, checks, findings, notes, time.perf_counter() - started
    )


def canary_bounds(
    who: Subject, canaries: int, seed: int, production: bool = False, confidence: float = 0.95
) -> tuple[tuple[Bound, ...], RecordedPlan, tuple[str, ...], tuple[str, ...]]:
    """(bounds, the plan that ran, notes, failures). No bounds if training failed, which is a failure that says why."""
    positive(canaries=canaries)
    notes: list[str] = []
    coordinates = int(who.sizes.sum())
    if canaries > coordinates:
        notes.append(
            f"{canaries} canaries were asked for, but only {coordinates} coordinates are trained; one canary has one of"
            " its own"
        )
        canaries = coordinates
    real = who.session.data.train(who.client)[:REAL]
    count = len(real) + canaries
    own = who.plan(1, 1, 1)  # for its clip and δ
    if production:
        made = who.session.plan(who.client)
        assert made is not None  # who.plan() would have raised
        total = made.steps * made.participations
        steps = min(STEPS, total)
        plan = who.plan(count, made.q * count, steps)
        if steps < total:
            notes.append(f"{steps} of the {total} steps of all participations were run, and ε is claimed for those")
        if made.q < 1:
            notes.append(
                "q < 1: the bounds f-dp and cp-gdp take a Gaussian trade-off curve for the subsampled one, an"
                " approximation"
            )
    else:
        plan = who.plan(count, count, 1, sigma=SIGMA, delta=DELTA)
    rng = random_stream(seed, "audit")
    tensor, element = places(who, canaries, rng)
    included = rng.random(canaries) < 0.5
    records = Records(int(real[0]), real, tensor, element, np.where(included, SIZE * own.clip, 0.0))
    try:
        # Production: small steps, so that the weights stay at the start, where the real examples' gradients are known.
        run = observe(who, records, plan, scale=1e-3 if production else 1.0)
    except (FedlabError, RuntimeError, ValueError) as error:
        return (), plan, tuple(notes), (f"training failed among canaries: {error}",)
    return lower_bounds(scores(who, records, run), included, plan.delta, confidence, seed), run.plan, tuple(notes), ()


def places(who: Subject, canaries: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A coordinate of its own for each canary: (tensor index [m], element [m]), in random order.

    Parts share alike, and tensors within a part: a small head left without noise is then half of the canaries, not a
    fiftieth.
    """
    parts = sorted({part_of(name) for name in who.names})
    members = [np.array([i for i, name in enumerate(who.names) if part_of(name) == part]) for part in parts]
    shares = _share(canaries, np.array([who.sizes[group].sum() for group in members]))
    tensor, element = [], []
    for group, total in zip(members, shares, strict=True):
        for index, count in zip(group, _share(int(total), who.sizes[group]), strict=True):
            tensor.append(np.full(count, index))
            element.append(rng.choice(int(who.sizes[index]), int(count), replace=False))
    order = rng.permutation(canaries)
    return np.concatenate(tensor)[order], np.concatenate(element)[order]


def _share(total: int, capacity: np.ndarray) -> np.ndarray:
    """``total`` dealt in equal shares, none above its capacity; the capacities together suffice."""
    given = np.zeros(len(capacity), dtype=np.int64)
    while total > 0:
        waiting = np.flatnonzero(given < capacity)
        each = max(1, total // len(waiting))
        for i in waiting:
            more = min(each, int(capacity[i] - given[i]), total)
            given[i] += more
            total -= more
    return given


def scores(who: Subject, records: Records, run: Observation) -> np.ndarray:
    """[m] released value at each canary's coordinate in units of C, less what the real examples put there.

    Mean: the steps that an included canary was drawn in; standard deviation: σ·√steps. What the real examples put there
    comes from plain autograd at the received weights, times the steps that each was read in.
    """
    drawn = np.concatenate([np.array([], dtype=np.int64), *run.log.positions])
    times = np.bincount(drawn, minlength=records.count)[: len(records.real)]
    values = {name: value.flatten().clone() for name, value in run.released.items()}
    for position, often in zip(records.real, times, strict=True):
        gradient, _ = clipped_gradient(who, int(position), run.plan.clip)
        for name, value in gradient.items():
            values[name] -= float(often) * value.flatten()
    result = np.zeros(len(records.size))
    for index, name in enumerate(who.names):
        mine = records.tensor == index
        result[mine] = values[name].numpy()[records.element[mine]]
    return result / run.plan.clip


def render(audit: EmpiricalAudit) -> str:
    """What ``fedlab audit --empirical`` prints."""
    setting = audit.configuration
    lines = [
        (
            f"{'FAIL' if audit.findings else 'pass'}: the trainer of {setting['model']},"
            f" {' + '.join(setting['parts'])}, white box, q = {setting['q']:g}, σ = {setting['sigma']:g},"
            f" {setting['steps']} step(s): claimed ε = {audit.claimed:.3f}, δ = {audit.delta:g}"
        ),
        *(
            f"  {b.name:8} ε ≥ {b.epsilon:.3f} at {b.confidence:.0%}, m = {b.canaries}, if {'; '.join(b.assumptions)}"
            for b in audit.bounds
        ),
        *(f"  {check:18} {'FAIL' if found else 'ok'}" for check, found in audit.mechanism.items()),
        *(f"finding: {sentence}" for sentence in audit.findings),
        *(f"note: {sentence}" for sentence in audit.notes),
        (
            f"{audit.seconds:.1f} s; a lower bound below the claim is no proof of it: one run sees about half of the"
            " true ε"
        ),
    ]
    return "\n".join(lines)
