"""Checks of the noise: released minus what independent arithmetic says was clipped is N(0, (σC)²), and independent of
all other noise.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import torch

from fedlab.seeds import random_stream
from fedlab.trainer_audit import p_values
from fedlab.trainer_audit.findings import ALARM, SLACK, accounted_std, by_tensor, failing
from fedlab.trainer_audit.observation import PREFIX, Observation, Records, Subject, clipped_gradient, observe


def one_step(who: Subject, findings: list[str]) -> None:
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
    with failing("one step: ", findings):
        run = observe(who, records, who.plan(records.count, records.count, 1))
        noise = {name: (run.released[name].flatten() - known[name]).numpy() for name in who.names}
        _gaussian("one step at q = 1", noise, accounted_std(run.plan), findings)


def many_steps(who: Subject, label: str, run: Observation, findings: list[str]) -> None:
    """Records without gradients: all that is released is noise, in sum and step by step; the plan's own report must
    agree.
    """
    steps, std = run.plan.event().steps, accounted_std(run.plan)
    _gaussian(
        f"{label}, {steps} steps in sum",
        {n: v.flatten().numpy() for n, v in run.released.items()},
        std * math.sqrt(steps),
        findings,
    )
    if run.log.released:
        _gaussian(f"{label}, step by step", by_tensor(who, np.stack(run.log.released)), std, findings)
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


def correlation(who: Subject, runs: dict[str, Observation], findings: list[str]) -> None:
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
    first = by_tensor(who, exact[0][None]) if exact else {}
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
