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

from collections.abc import Iterable

from fedlab.session import Session
from fedlab.trainer_audit.findings import DENSE, SPARSE, Findings, failing
from fedlab.trainer_audit.noise_checks import correlation, many_steps, one_step
from fedlab.trainer_audit.observation import DEFAULT_PARTS, Observation, Records, observe, subject
from fedlab.trainer_audit.sampler_checks import sampler, steps
from fedlab.trainer_audit.sensitivity import post_processing, sensitivity
from fedlab.trainer_audit.shared_pass import shared_pass

CHECKS = ("sensitivity", "post-processing", "noise variance", "noise correlation", "sampler", "steps", "shared pass")


def check_mechanism(
    session: Session, client: str | None = None, seed: int = 0, parts: Iterable[str] = DEFAULT_PARTS
) -> Findings:
    """All checks on one client's plan (the first client unless named): check → sentences, empty lists where all is
    well.

    Raises ConfigError where the run is not private, or for an unknown client or part.
    """
    who = subject(session, client, seed, parts)
    findings: Findings = {check: [] for check in CHECKS}
    text = int(session.data.train(who.client)[0])
    sensitivity(who, findings["sensitivity"])
    post_processing(who, findings["post-processing"])
    one_step(who, findings["noise variance"])
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
        with failing(f"{label}: ", findings["steps"]):
            # Small steps: the weights stay near the received state, whatever the noise.
            runs[label] = observe(who, records, who.plan(*shape), name, round_number, scale=0.01)
    for label, run in runs.items():
        steps(label, run, findings["steps"])
        many_steps(who, label, run, findings["noise variance"])
    alike = {label: run for label, run in runs.items() if run.plan.n == DENSE[0]}
    if alike:
        correlation(who, alike, findings["noise correlation"])
        sampler(list(alike.values()), findings["sampler"])
    with failing("", findings["shared pass"]):
        findings["shared pass"] += shared_pass(who)
    return findings
