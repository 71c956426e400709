"""Shared noise: whether the clients' shares add up to what each of them claims.

Every client's claim rests on the others' shares, so all PLANs of a run must say the same, and each share must be what
the honest survivors need of it: share²·(survivors − colluding) ≥ (σ·(2^bits + √d))², in exact arithmetic. The number of
coordinates d is held against the tensors of the sealed checkpoint where the signed scope names them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations
from typing import Any

from fedlab.privacy.audit.directory import AuditedDirectory, Evidence
from fedlab.privacy.audit.lines import Line
from fedlab.privacy.audit.receipts import WHERE
from fedlab.privacy.audit.rules import event_of, real
from fedlab.privacy.audit.tensors import CHECKPOINT, SERVER, read_tensors

BITS = 20  # of the grid that a configuration makes
PARTS = ("lora_A", "lora_B", "head")
ROOM = 63  # bits of a sum, beside its sign
TAILS = 50  # standard deviations of every share for which there must be room


def shared_of(plan: Line) -> Mapping[str, Any] | None:
    """``shared`` of a PLAN; None where all noise is the client's own, as in lines from before there was any other."""
    found: Mapping[str, Any] | None = plan.body.get("shared")
    return found


def check_shares(audit: AuditedDirectory, evidence: Evidence) -> None:
    """Every PLAN by itself, and those of this run against ``run.toml`` and against each other."""
    for name, ledger in evidence.ledgers.items():
        for plan in ledger.plans:
            if plan.sound:
                for problem in problems_of_plan(plan):
                    audit.find(name, problem, plan.number)
    signed = {name: ledger.plan(evidence.run) for name, ledger in evidence.ledgers.items()}
    plans = {name: plan for name, plan in signed.items() if plan is not None and plan.sound}
    try:
        asked = _asked(evidence.config)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        audit.find("run.toml", "lacks settings that a run under shared noise has, so no share can be compared with it")
        return
    for name, plan in plans.items():
        for problem in _against(shared_of(plan), asked):
            audit.find(name, problem, plan.number)
    shared = {name: plan for name, plan in plans.items() if shared_of(plan)}
    if not shared:
        return
    for problem in _of_rounds(evidence, asked):
        audit.find("run.toml", problem)
    _alike(audit, shared)
    _dimension(audit, evidence, shared)
    _room(audit, shared)
    _survivors(audit, evidence, shared)


def problems_of_plan(plan: Line) -> Iterator[str]:
    """What is wrong with one PLAN's shares, whatever its run."""
    shared, event = shared_of(plan), event_of(plan)
    if (shared is None) != (event.sampler != "poisson_discrete"):
        yield (
            f"PLAN has the sampler {event.sampler!r} {'without' if shared is None else 'with'} shares of noise; the two"
            " belong together"
        )
    if shared is None:
        return
    if plan["unit"] != "example" or event.steps != 1:
        yield "PLAN shares noise, which is for one step per round of unit example"
    if not shared["colluding"] < shared["survivors"]:
        yield f"PLAN has {shared['colluding']} colluding clients of {shared['survivors']} survivors: no share is left"
    elif not enough(shared, event.sigma):
        yield (
            f"PLAN claims σ = {event.sigma:.6g}, which the shares of {shared['survivors'] - shared['colluding']} honest"
            f" survivors do not come to: each is {real(shared['share']):.8g} grid steps"
        )


def enough(shared: Mapping[str, Any], sigma: float) -> bool:
    """share²·(survivors − colluding) ≥ (σ·(2^bits + √d))², by fractions; √d to 30 digits, rounded down."""
    root = Fraction(math.isqrt(shared["dimension"] * 10**60), 10**30)
    has = Fraction(real(shared["share"])) ** 2 * (shared["survivors"] - shared["colluding"])
    return bool(has >= (Fraction(sigma) * (2 ** shared["bits"] + root)) ** 2)


def _asked(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What ``run.toml`` says of shares; None if it asks for none."""
    privacy = config.get("privacy") or {}
    if privacy.get("survivors") is None:
        return None
    run, clients = config["run"], config["data"]["clients"]
    return {
        "survivors": _whole(privacy["survivors"]),
        "colluding": _whole(privacy.get("colluding", 0)),
        "bits": BITS,
        "drawn": max(1, round(run["fraction"] * clients)),
    }


def _whole(value: Any) -> int:
    """A count. Raises ValueError for what is none, in which another reader may see another number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!a} is no count")
    return value


def _against(shared: Mapping[str, Any] | None, asked: Mapping[str, Any] | None) -> Iterator[str]:
    """A PLAN's shares against those of ``run.toml``."""
    if (shared is None) != (asked is None):
        yield f"PLAN {'shares no' if shared is None else 'shares'} noise, run.toml says otherwise (privacy.survivors)"
    elif shared is not None and asked is not None:
        for key in ("survivors", "colluding", "bits"):
            if shared[key] != asked[key]:
                yield f"PLAN has {key} {shared[key]} of its shares, run.toml makes it {asked[key]}"


def _of_rounds(evidence: Evidence, asked: Mapping[str, Any] | None) -> Iterator[str]:
    """Two sets of survivors of one round can never both be confirmed."""
    if asked is None or not evidence.config:
        return
    least = max(2, (asked["drawn"] + asked["colluding"]) // 2 + 1)
    if not least <= asked["survivors"] <= asked["drawn"]:
        yield (
            f"privacy.survivors = {asked['survivors']} of {asked['drawn']} clients per round, {asked['colluding']} of"
            f" them colluding, must be from {least} to {asked['drawn']}"
        )


def _terms(plan: Line) -> dict[str, Any]:
    """What all clients of a sum must have signed alike."""
    shared, event = shared_of(plan), event_of(plan)
    assert shared is not None
    return {"q": event.q, "σ": event.sigma, "C": real(plan["clip"]), "δ": real(plan["delta"]), **shared}


def _alike(audit: AuditedDirectory, plans: Mapping[str, Line]) -> None:
    """Each one's claim rests on the others' shares."""
    (first, reference), *others = plans.items()
    for name, plan in others:
        for key, value in _terms(plan).items():
            if value != (expected := _terms(reference)[key]):
                text = f"PLAN has {key} = {value} where {first} has {expected}: the noise of a sum is that of all"
                audit.find(name, text, plan.number)


def _dimension(audit: AuditedDirectory, evidence: Evidence, plans: Mapping[str, Line]) -> None:
    """The coordinates that were signed are those of the tensors that were signed."""
    final = evidence.receipts.final if evidence.receipts else None
    kept = [name for name in final["files"] if name.startswith(CHECKPOINT)] if final is not None else []
    if len(kept) != 1:
        return
    try:
        tensors = read_tensors(audit.root / kept[0])
    except (OSError, ValueError):
        return  # which the comparison of the adapter says
    shapes = {name: value.shape for name, value in tensors.items() if not name.startswith(SERVER)}
    sizes = dict(_scopes(shapes))
    for name, plan in plans.items():
        signed = (shared_of(plan) or {})["dimension"]
        found = sizes.get(plan["scope"])
        if found is None:
            text = f"PLAN shares noise over dimension {signed}, but its scope is not that of the checkpoint's tensors"
            audit.find(name, text, plan.number)
        elif found != signed:
            audit.find(name, f"PLAN has dimension {signed} of its shares, its scope has {found}", plan.number)


def _scopes(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, int]]:
    """(scope, coordinates) of each choice of parts that may have been signed."""
    for count in range(1, len(PARTS) + 1):
        for parts in combinations(PARTS, count):
            chosen = {
                name: tuple(int(side) for side in shape)
                for name, shape in shapes.items()
                if ("head" if name.startswith("head.") else name.rpartition(".")[2]) in parts
            }
            text = "\n".join(f"{name}:{shape}" for name, shape in sorted(chosen.items()))
            yield hashlib.sha256(text.encode()).hexdigest(), sum(math.prod(shape) for shape in chosen.values())


def _room(audit: AuditedDirectory, plans: Mapping[str, Line]) -> None:
    """No sum leaves the integers modulo 2^64."""
    most = 0
    for plan in plans.values():
        shared = shared_of(plan) or {}
        most += plan["n"] * 2 ** shared["bits"] + math.ceil(TAILS * Fraction(real(shared["share"])) + 1)
    if most >= 2**ROOM:
        name, plan = next(iter(plans.items()))
        audit.find(name, f"a sum of these shares could reach 2^{math.log2(most):.1f}, above 2^{ROOM}", plan.number)


def _survivors(audit: AuditedDirectory, evidence: Evidence, plans: Mapping[str, Line]) -> None:
    """No sum of fewer clients was used."""
    least = max((shared_of(plan) or {})["survivors"] for plan in plans.values())
    for line in evidence.receipts.chain.of("ROUND") if evidence.receipts else ():
        if line.sound and 0 < len(line["clients"]) < least:
            text = f"ROUND {line['round']} used a sum of {len(line['clients'])} clients; their plans want {least}"
            audit.find(WHERE, text, line.number)
