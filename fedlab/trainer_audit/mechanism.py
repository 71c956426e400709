"""Does the trainer do what its plan says? Deterministic replays and exact tests on the real ``train_client``, in
seconds.

They find what no lower bound on ε can (a √2 too much sensitivity, a sixth too little noise) and cost less. Every check
rests on released values (the update, the weights after each step) or on which records were read; what the plan itself
reports is only compared with those.

| check | what is held against the plan |
|---|---|
| ``sensitivity`` | the change of the update when one record is added or removed, noise shared: at most C (Re:cord-play style) |
| ``post-processing`` | under the run's own optimiser: if privatise returns the same, the update is the same, bit for bit |
| ``noise variance`` | released minus what independent arithmetic says was clipped: N(0, (σC)²), per tensor, χ² and Kolmogorov–Smirnov |
| ``noise correlation`` | noise of two steps, rounds, clients or tensors: independent |
| ``sampler`` | which records are read in which step: Poisson, and anew in every step, round and client |
| ``steps`` | optimiser steps and noise draws: as many as are charged, empty batches included |
| ``shared pass`` | a client's update from a pass that several clients share: what it is alone (``fedlab.trainer_audit.shared_pass``) |

A statistical test accuses only at p < 1e-7 over all its comparisons together, so that a correct trainer passes 100,000
seeds. Not tested: the accountant, the averaging, and whether the operating system's randomness is any good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from fedlab.errors import FedlabError
from fedlab.seeds import random_stream
from fedlab.session import Session
from fedlab.trainer_audit import p_values
from fedlab.trainer_audit.observation import (
    DEFAULT_PARTS,
    PREFIX,
    Observation,
    RecordedPlan,
    Records,
    Subject,
    clipped_gradient,
    observe,
    subject,
)
from fedlab.trainer_audit.shared_pass import shared_pass

ALARM = 1e-7  # p below which a correct build is not believed
SLACK = 1e-3  # relative, for float32 gradients and weights
CHECKS = ("sensitivity", "post-processing", "noise variance", "noise correlation", "sampler", "steps", "shared pass")
SHORT = "of norm 0.5·C"  # an adversary that clipping leaves alone, so that its effect is known
LONG = "of norm 1000·C"
DENSE = (300, 30, 10)  # records, expected batch, steps: three runs (two rounds, two clients) for noise and sampling
SPARSE = (20, 0.5, 25)  # three batches in five are empty; that none is has probability 1e-10

Findings = dict[str, list[str]]


def conformance(
    session: Session, client: str | None = None, seed: int = 0, parts: Iterable[str] = DEFAULT_PARTS
) -> Findings:
    """All checks on one client's plan (the first client unless named): check → sentences, empty lists where all is
    well.

    Raises ConfigError where the run is not private, or for an unknown client or part.
    """
    who = subject(session, client, seed, parts)
    findings: Findings = {check: [] for check in CHECKS}
    text = int(session.data.train(who.client)[0])
    _sensitivity(who, findings["sensitivity"])
    _post_processing(who, findings["post-processing"])
    _one_step(who, findings["noise variance"])
    runs: dict[str, Observation] = {}
    dense, sparse = Records.zeros(text, DENSE[0]), Records.zeros(text, SPARSE[0])
    other = next((name for name in session.data.clients if name != who.client), "another client")
    schedule = [
        ("round 1", dense, DENSE, who.client, 1),
        ("round 2", dense, DENSE, who.client, 2),
        ("another client", dense, DENSE, other, 1),
        ("sparse batches", sparse, SPARSE, who.client, 1),
    ]
    if who.plan(1, 1, 1).noise == "secure":  # what no seed reaches must not repeat itself
        schedule.append(("round 1 again", dense, DENSE, who.client, 1))
    for label, records, shape, name, round_number in schedule:
        with _failing(f"{label}: ", findings["steps"]):
            # Small steps: the weights stay near the received state, whatever the noise.
            runs[label] = observe(who, records, who.plan(*shape), name, round_number, scale=0.01)
    for label, run in runs.items():
        _steps(label, run, findings["steps"])
        _many_steps(who, label, run, findings["noise variance"])
    alike = {label: run for label, run in runs.items() if run.plan.n == DENSE[0]}
    if alike:
        _correlation(who, alike, findings["noise correlation"])
        _sampler(list(alike.values()), findings["sampler"])
    with _failing("", findings["shared pass"]):
        findings["shared pass"] += shared_pass(who)
    return findings


@contextmanager
def _failing(label: str, findings: list[str]) -> Iterator[None]:
    """A run that breaks is a finding: whether it breaks may depend on one record."""
    try:
        yield
    except (FedlabError, RuntimeError, ValueError) as error:
        findings.append(f"{label}training failed: {error}")


# --- sensitivity
# ----------------------------------------------------------------------------------------------------------------


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


def _sensitivity(who: Subject, findings: list[str]) -> None:
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
    with _failing("", findings):
        neighbours["zeroed out"] = observe(who, records, plan)
        neighbours["removed"] = observe(who, records, replace(plan, absent=count))
    for label, gradient in _adversaries(who, clip):
        with _failing(f"with a gradient {label}, ", findings):
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
    with _failing("over several steps, ", findings):
        several, spiked = (
            replace(plan, steps=3),
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
        with _failing(f"with a real record, {label}, ", findings):
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


def _post_processing(who: Subject, findings: list[str]) -> None:
    """Momentum, AdamW, weight decay and prox must work on the noised gradient alone: privatise is blinded, and one
    record changes.
    """
    clip, text = who.plan(1, 1, 1).clip, int(who.session.data.train(who.client)[0])
    plan = replace(who.plan(8, 8, 3), noise="seeded", blind=True)
    gradient = dict(_adversaries(who, clip))[LONG]
    with _failing("", findings):
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


# --- noise
# ----------------------------------------------------------------------------------------------------------------------


def _one_step(who: Subject, findings: list[str]) -> None:
    """One step at q = 1 over real records and Dirac records, whose clipped sum is known without the trainer."""
    real = who.session.data.train(who.client)[:6]
    clip = who.plan(1, 1, 1).clip
    rng = random_stream(0, "conformance")
    tensor = np.arange(4 * len(who.names)) % len(who.names)
    element = (rng.random(len(tensor)) * who.sizes[tensor]).astype(np.int64)
    records = Records(int(real[0]), real, tensor, element, np.full(len(tensor), 10 * clip))
    known = {name: torch.zeros(who.state[name].numel(), dtype=torch.float64) for name in who.names}
    for position in real:
        for name, value in clipped_gradient(who, int(position), clip)[0].items():
            known[name] += value.flatten()
    for index, place in zip(tensor, element, strict=True):
        known[who.names[index]][place] += clip
    with _failing("one step: ", findings):
        run = observe(who, records, who.plan(records.count, records.count, 1))
        noise = {name: (run.released[name].flatten() - known[name]).numpy() for name in who.names}
        _gaussian("one step at q = 1", noise, _std(run.plan), findings)


def _many_steps(who: Subject, label: str, run: Observation, findings: list[str]) -> None:
    """Records without gradients: all that is released is noise, in sum and step by step; the plan's own report must
    agree.
    """
    steps, std = run.plan.event().steps, _std(run.plan)
    _gaussian(
        f"{label}, {steps} steps in sum",
        {n: v.flatten().numpy() for n, v in run.released.items()},
        std * math.sqrt(steps),
        findings,
    )
    if run.log.released:
        _gaussian(f"{label}, step by step", _by_tensor(who, np.stack(run.log.released)), std, findings)
    for name, squares in run.log.squares.items():
        p = p_values.variance_p(squares, run.log.elements[name], std)
        if p * len(run.log.squares) < ALARM:
            findings.append(
                _sentence(f"{label}, inside privatise", name, math.sqrt(squares / run.log.elements[name]) / std, p)
            )
    for name, value in run.released.items():
        private = run.log.private.get(name, torch.zeros(())).cpu() * run.plan.normaliser
        gap = float((value - private).abs().max())
        largest = float(who.state[name].abs().max()) * run.plan.normaliser / run.lr + float(value.abs().max())
        if not gap <= SLACK * std + steps * 2.0**-22 * largest:
            findings.append(
                f"{label}, {name}: the update is not −lr times what privatise returned; they differ by"
                f" {gap / std:.3g}·σC"
            )


def _gaussian(label: str, noise: dict[str, np.ndarray], std: float, findings: list[str]) -> None:
    """χ² per tensor against the claimed variance; one Kolmogorov–Smirnov test of the shape over all of them."""
    for name, value in noise.items():
        p = p_values.variance_p(float(np.square(value).sum()), value.size, std)
        if p * len(noise) < ALARM:
            findings.append(_sentence(label, name, float(np.sqrt(np.square(value).mean())) / std, p))
    everything = np.concatenate([value.ravel() for value in noise.values()])[:100_000] / std
    if (p := p_values.shape_p(everything)) < ALARM:
        findings.append(f"{label}: the noise is not N(0, (σC)²) (Kolmogorov–Smirnov, p = {p:.1g})")


def _sentence(label: str, name: str, ratio: float, p: float) -> str:
    return (
        f"{label}, {name}: the noise has {ratio:.4g} times the standard deviation that is accounted for (p = {p:.1g})"
    )


def _std(plan: RecordedPlan) -> float:
    """The noise that is accounted for: σ of the event, not of the plan."""
    return plan.event().sigma * plan.clip


def _by_tensor(who: Subject, steps: np.ndarray) -> dict[str, np.ndarray]:
    """[steps, joined prefixes] → tensor → [steps, its prefix]."""
    edges = np.cumsum(np.minimum(who.sizes, PREFIX))[:-1]
    return dict(zip(who.names, np.split(steps, edges, axis=1), strict=True))


def _correlation(who: Subject, runs: dict[str, Observation], findings: list[str]) -> None:
    """Every step of every run against every other;
    every tensor against every other over their common first elements.
    """
    labels = [f"{label}, step {i + 1}" for label, run in runs.items() for i in range(len(run.log.released))]
    steps = [vector for run in runs.values() for vector in run.log.released]
    if len(steps) > 1:
        pairs = list(combinations(range(len(steps)), 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.corrcoef(np.stack(steps))[tuple(np.array(pairs).T)]
        _report([f"{labels[a]} and {labels[b]}" for a, b in pairs], r, len(steps[0]), findings)
    exact = [vector for run in runs.values() for vector in run.log.heads]
    if len({vector.tobytes() for vector in exact}) < len(exact):
        findings.append("two steps drew exactly the same noise")
    tensors = {n: v.flatten().numpy() for n, v in next(iter(runs.values())).released.items()}
    first = _by_tensor(who, exact[0][None]) if exact else {}
    tests: list[tuple[str, float, int]] = []
    for a, b in combinations(who.names, 2):
        k = min(tensors[a].size, tensors[b].size)
        if first and np.array_equal(first[a][0, : min(k, PREFIX)], first[b][0, : min(k, PREFIX)]):
            findings.append(f"{a} and {b} were given exactly the same noise")
        if k >= 8:
            x, y = tensors[a][:k] - tensors[a][:k].mean(), tensors[b][:k] - tensors[b][:k].mean()
            norm = float(np.linalg.norm(x) * np.linalg.norm(y))
            tests.append((f"{a} and {b}", float(x @ y) / norm if norm else 0.0, k))
    for k in {size for _, _, size in tests}:
        mine = [(label, r) for label, r, size in tests if size == k]
        _report([label for label, _ in mine], np.array([r for _, r in mine]), k, findings)


def _report(labels: list[str], r: np.ndarray, count: int, findings: list[str]) -> None:
    """Accuse the worst of many correlations over ``count`` elements."""
    if (bad := np.flatnonzero(p_values.correlation_p(r, count) * len(r) < ALARM)).size:
        worst = int(bad[np.argmax(np.abs(r[bad]))])
        more = f" (and {bad.size - 1} more pairs)" if bad.size > 1 else ""
        findings.append(f"noise of {labels[worst]}{more} correlates: r = {r[worst]:.3f}")


# --- sampler and steps
# ----------------------------------------------------------------------------------------------------------


def _sampler(runs: list[Observation], findings: list[str]) -> None:
    """Which records were read in which step, against independent coins of probability q."""
    event, n = runs[0].plan.event(), runs[0].plan.n
    if event.sampler != "poisson":
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


def _steps(label: str, run: Observation, findings: list[str]) -> None:
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
        if (gap := float(np.abs(whole - moved).max())) > SLACK * _std(run.plan) + rounding:
            findings.append(f"{label}: the update holds {gap / _std(run.plan):.3g}·σC that no optimiser step made")
