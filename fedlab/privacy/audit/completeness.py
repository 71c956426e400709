"""Whether everything in a run directory is of one run, with one unit, and complete as far as the run got."""

from __future__ import annotations

import hashlib
from typing import Any

from fedlab.privacy.audit.claims import RESULT
from fedlab.privacy.audit.directory import AuditedDirectory, Evidence
from fedlab.privacy.audit.receipts import WHERE
from fedlab.privacy.audit.rules import Ledger


def check_run(audit: AuditedDirectory, evidence: Evidence) -> None:
    """Run, unit and end of the server's file, and the run and unit of every ledger."""
    _check_run_id(audit, evidence)
    run = evidence.run
    for name, ledger in evidence.ledgers.items():
        _check_ledger(audit, name, ledger, run, evidence)
    if evidence.unit == "example" and "server" in evidence.ledgers:
        audit.find("server", 'has a ledger, which only a run with privacy.unit = "client" has')
    _check_config(audit, evidence)
    _check_ends(audit, evidence)
    if evidence.finished and evidence.receipts:
        _check_status(audit, evidence)


def unclosed(evidence: Evidence) -> list[str]:
    """Owners that signed a plan of this run and whose ledger does not say that it is over for them."""
    ledgers = evidence.ledgers.items()
    return [name for name, ledger in ledgers if ledger.plan(evidence.run) and not ledger.closed(evidence.run)]


def _check_run_id(audit: AuditedDirectory, evidence: Evidence) -> None:
    """The server's file is of the run and the unit that the rest says."""
    run, receipts = evidence.environment.get("run_id"), evidence.receipts
    if evidence.environment and not isinstance(run, str):
        audit.find("environment.json", "has no run_id, so no ledger line can be assigned to this run")
    if receipts and receipts.start:
        if receipts.start["unit"] != evidence.unit:
            audit.find(WHERE, f"START has unit {receipts.start['unit']!r}, run.toml says {evidence.unit!r}")
        if isinstance(run, str) and receipts.run != run:
            audit.find(WHERE, f"belongs to run {receipts.run}, environment.json says {run!a}")


def _check_ledger(audit: AuditedDirectory, name: str, ledger: Ledger, run: str, evidence: Evidence) -> None:
    plan, unit = ledger.plan(run), evidence.unit
    if plan and plan.sound and plan["unit"] != unit and (unit == "example" or name == "server"):
        audit.find(name, f"PLAN has unit {plan['unit']!r}, run.toml says {unit!r}", plan.number)
    receipted = any(line["run"] == run for line in ledger.releases)
    if evidence.receipts is None and receipted and not evidence.finished:
        audit.find(name, f"was given receipts in this run, but there is no {WHERE}")
    if ledger.closed(run) and evidence.receipts is None and not evidence.finished:
        audit.find(name, f"says that this run is over, but there is no {WHERE}")


def _check_config(audit: AuditedDirectory, evidence: Evidence) -> None:
    """``run.toml`` is the one that START names, from the run's first moment on."""
    start, text = (evidence.receipts.start if evidence.receipts else None), audit.read("run.toml")
    if start is not None and text is not None and hashlib.sha256(text).hexdigest() != start.body.get("config"):
        audit.find("run.toml", f"is not the configuration that START names ({WHERE} line {start.number})")


def _check_ends(audit: AuditedDirectory, evidence: Evidence) -> None:
    """The server's file starts with a START and ends in a FINAL; of a run that did not finish it may lack them."""
    receipts, status = evidence.receipts, evidence.status
    if receipts is None:
        if evidence.finished:
            audit.find(WHERE, "is missing")
        else:
            audit.note(f"{WHERE} is missing: the run was {status}")
        return
    if receipts.start is None:
        audit.find(WHERE, "names no START, so no key is known")
    if receipts.closed:
        return
    if evidence.finished:
        audit.find(WHERE, f"does not end in a FINAL, though the run was {status}")
    else:
        audit.note(f"{WHERE} has no FINAL: the run was {status}")


def _check_status(audit: AuditedDirectory, evidence: Evidence) -> None:
    """A completed run has all its rounds; one that the budget ended has too few clients that may go on."""
    assert evidence.receipts is not None
    made = {line["round"] for line in evidence.receipts.chain.of("ROUND") if line.sound}
    asked = _integer(evidence.config, "run", "rounds")
    if evidence.status == "completed":
        if asked is not None and made != set(range(1, asked + 1)) and not evidence.receipts.chain.holes:
            audit.find(RESULT, f"says completed; run.toml asks for {asked} rounds, {WHERE} has {len(made)}")
        return
    if evidence.unit == "client":
        ended = bool(evidence.ledgers.get("server") and evidence.ledgers["server"].refusals)
        if not ended:
            audit.find(RESULT, "says budget-exhausted, but the server's ledger refuses no round")
        return
    able = [name for name, ledger in evidence.ledgers.items() if _able(ledger, evidence.run)]
    needed = _integer(evidence.config, "run", "min_clients") or 1
    if len(able) >= needed:
        text = f"says budget-exhausted, but {len(able)} clients refused nothing and had rounds left, e.g. {able[0]!a}"
        audit.find(RESULT, text)


def _able(ledger: Ledger, run: str) -> bool:
    """Whether a client could have gone on: it signed a plan, refused nothing, and has participations left."""
    plan = ledger.plan(run)
    if plan is None or any(line["run"] == run for line in ledger.refusals):
        return False
    return bool(ledger.charges_of(run) < plan["participations"])


def _integer(config: Any, section: str, key: str) -> int | None:
    value = config.get(section, {}).get(key) if isinstance(config.get(section), dict) else None
    return value if isinstance(value, int) else None
