"""Whether everything in a run directory is of one run, with one unit, and complete as far as the run got."""

from __future__ import annotations

from fedlab.privacy.audit.claims import RESULT
from fedlab.privacy.audit.directory import AuditedDirectory, Evidence
from fedlab.privacy.audit.receipts import WHERE, check_files
from fedlab.privacy.audit.rules import Ledger


def check_run(audit: AuditedDirectory, evidence: Evidence) -> None:
    """Run, unit and end of the server's file, and the run and unit of every ledger."""
    run = _run_id(audit, evidence)
    for name, ledger in evidence.ledgers.items():
        _check_ledger(audit, name, ledger, run, evidence)
    if evidence.unit == "example" and "server" in evidence.ledgers:
        audit.find("server", 'has a ledger, which only a run with privacy.unit = "client" has')
    _check_ends(audit, evidence)


def check_final(audit: AuditedDirectory, evidence: Evidence) -> None:
    """The files of the adapter and ``result.json`` are those that the server's last line seals."""
    final = evidence.receipts.final if evidence.receipts else None
    if final is None:
        return
    audit.findings += check_files(audit.root, final)
    for key, name in (("state", "adapter_digest"), ("status", "status")):
        if evidence.result and evidence.result.get(name) != final[key]:
            audit.find(RESULT, f"{name} is not {key} of FINAL ({WHERE} line {final.number})")


def _run_id(audit: AuditedDirectory, evidence: Evidence) -> str:
    """The run's id, of the server's file if that names one; empty if nothing does."""
    environment = audit.read_json("environment.json") or {}
    run, receipts = environment.get("run_id"), evidence.receipts
    if environment and not isinstance(run, str):
        audit.find("environment.json", "has no run_id, so no ledger line can be assigned to this run")
    if receipts and receipts.start:
        if receipts.start["unit"] != evidence.unit:
            audit.find(WHERE, f"START has unit {receipts.start['unit']!r}, run.toml says {evidence.unit!r}")
        if isinstance(run, str) and receipts.run != run:
            audit.find(WHERE, f"belongs to run {receipts.run}, environment.json says {run!a}")
    if receipts and receipts.run:
        return receipts.run
    return run if isinstance(run, str) else ""


def _check_ledger(audit: AuditedDirectory, name: str, ledger: Ledger, run: str, evidence: Evidence) -> None:
    plan, unit = ledger.plan(run), evidence.unit
    if plan and plan.sound and plan["unit"] != unit and (unit == "example" or name == "server"):
        audit.find(name, f"PLAN has unit {plan['unit']!r}, run.toml says {unit!r}", plan.number)
    receipted = any(line["run"] == run for line in ledger.releases)
    if evidence.receipts is None and receipted and not evidence.finished:
        audit.find(name, f"was given receipts in this run, but there is no {WHERE}")


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
