"""``run.toml`` against what was signed: every PLAN of this run must be the one that the configuration makes.

The rules are those of ``docs/ledger.md``, computed here a second time. What a configuration leaves to the data (a
client's size) is taken from the PLAN.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from fedlab.privacy.accounting import Event
from fedlab.privacy.audit.directory import AuditedDirectory, Evidence
from fedlab.privacy.audit.lines import Line
from fedlab.privacy.audit.recompute import recompute
from fedlab.privacy.audit.rules import event_of, real

Tree = Mapping[str, Any]


def check_terms(audit: AuditedDirectory, evidence: Evidence) -> None:
    """Hold every PLAN of this run against ``run.toml``."""
    text = audit.read("run.toml")
    if not evidence.config or text is None:
        return
    whole = hashlib.sha256(text).hexdigest()
    expected = _of_client if evidence.unit == "example" else _of_server
    for name, ledger in evidence.ledgers.items():
        plan = ledger.plan(evidence.run)
        if plan is None or not plan.sound or plan["unit"] != evidence.unit:
            continue
        try:
            if plan.body.get("configuration", whole) != whole:  # which the first edition does not sign
                audit.find(name, "PLAN was signed for another run.toml", plan.number)
            for key, signed, wanted in expected(evidence.config, plan):
                if signed != wanted:
                    audit.find(
                        name, f"PLAN has {key} {_shown(signed)}, run.toml makes it {_shown(wanted)}", plan.number
                    )
            _check_target(audit, name, plan, evidence.config)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
            audit.find("run.toml", "lacks settings that a private run has, so no PLAN can be compared with it")
            return


def _common(config: Tree, plan: Line, q: float) -> Iterator[tuple[str, Any, Any]]:
    """(term, as signed, as the configuration makes it)."""
    privacy, n = config["privacy"], plan["n"]
    yield "noise", plan["noise"], privacy["noise"]
    yield "clip", real(plan["clip"]), float(privacy["clip"])
    yield "q", event_of(plan).q, q
    yield "normaliser", real(plan["normaliser"]), q * n
    if "sigma" in privacy:
        yield "σ", event_of(plan).sigma, float(privacy["sigma"])
    budget = privacy.get("budget")
    if budget is not None:
        most = real(plan["budget"]["epsilon"]) if plan["budget"] else math.inf
        yield "budget", max(most, float(budget["epsilon"])), float(budget["epsilon"])
    given = privacy.get("delta", (budget or {}).get("delta"))
    # under shared noise δ is one for all clients, as σ is
    default = min(1e-5, 1 / (10 * n)) if privacy.get("survivors") is None else 1e-5
    delta = float(given) if given is not None else default
    # In a stream δ is one for all tasks, the smallest of theirs.
    signed = real(plan["delta"])
    yield "δ", max(signed, delta) if config.get("tasks") else signed, delta


def _of_client(config: Tree, plan: Line) -> Iterator[tuple[str, Any, Any]]:
    """What one client signs under unit ``example``."""
    train, n = config["train"], plan["n"]
    shared = config["privacy"].get("survivors") is not None
    yield "sampler", event_of(plan).sampler, "poisson_discrete" if shared else "poisson"
    steps = train.get("steps")
    wanted = steps if steps is not None else math.ceil(train["epochs"] * n / train["batch_size"])
    yield "steps", event_of(plan).steps, wanted
    yield "participations", plan["participations"], _participations(config)
    rate = train.get("sampling_rate")
    yield from _common(config, plan, float(rate) if rate is not None else min(1.0, train["batch_size"] / n))


def _of_server(config: Tree, plan: Line) -> Iterator[tuple[str, Any, Any]]:
    """What the server signs under unit ``client``."""
    run, n = config["run"], config["data"]["clients"]
    if run["fraction"] == 1:
        sampler, q = "full", 1.0
    elif run["sampling"] == "poisson":
        sampler, q = "poisson", float(run["fraction"])
    else:
        sampler, q = "fixed_wor", _per_round(config) / n
    yield "sampler", event_of(plan).sampler, sampler
    yield "steps", event_of(plan).steps, 1
    yield "n", plan["n"], n
    yield "participations", plan["participations"], run["rounds"]
    yield from _common(config, plan, q)


def _per_round(config: Tree) -> int:
    drawn: int = round(config["run"]["fraction"] * config["data"]["clients"])
    return max(1, drawn)


def _participations(config: Tree) -> int:
    rounds, most = config["run"]["rounds"], config["privacy"].get("participations")
    if most is not None:
        return int(min(most, rounds))
    return int(-(-_per_round(config) * rounds // config["data"]["clients"]))


def _check_target(audit: AuditedDirectory, name: str, plan: Line, config: Tree) -> None:
    """σ is at least what ``privacy.epsilon`` asks for: all participations together spend no more."""
    asked = config["privacy"].get("epsilon")
    if asked is None:
        return
    event = event_of(plan)
    whole = Event(event.sampler, event.q, event.sigma, event.steps * plan["participations"])
    spent = recompute([whole], real(plan["delta"])).pld
    if spent > float(asked) * (1 + 1e-3) + 1e-3:
        text = f"PLAN spends ε = {spent:.4f} over its participations, run.toml asks for {float(asked):g}"
        audit.find(name, text, plan.number)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
