"""A run directory against what one client kept at home: its own ledger, with the server's receipts in it.

A receipt is a line of the server's chain, so it fixes all that went before it: the configuration, everybody's key,
every round and update up to its own. What the directory shows must agree with that, and must not end before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedlab.privacy.audit.chain import read_chain
from fedlab.privacy.audit.directory import AuditedDirectory, Evidence
from fedlab.privacy.audit.lines import Line, parse
from fedlab.privacy.audit.receipts import WHERE
from fedlab.privacy.audit.rules import Ledger, read_ledger
from fedlab.privacy.audit.schema import CLIENT


@dataclass(frozen=True)
class Kept:
    """How far kept receipts reach: ``round``, the last one that they hold; ``whole``: it is the run's last."""

    owners: tuple[str, ...]
    round: int
    whole: bool


def check_kept(audit: AuditedDirectory, evidence: Evidence, kept: Mapping[str, bytes]) -> Kept:
    """Hold the directory against kept ledgers.

    Args:
        audit: takes the findings.
        evidence: what the directory holds.
        kept: name of the file → its bytes.
    """
    owners, reached = [], 0
    for where, data in kept.items():
        owner = _owner(data)
        ledger = read_ledger(read_chain(data, where, owner, CLIENT, "PLAN"))
        audit.findings += ledger.findings
        if evidence.unit == "client":
            audit.find(where, 'clients keep no ledgers in a run with privacy.unit = "client"')
        elif ledger.plan(evidence.run) is None:
            audit.find(where, f"shows nothing of this run ({evidence.run or 'whose id is not known'})")
        else:
            owners.append(owner)
            _compare(audit, evidence, where, ledger)
            reached = max(reached, _receipts(audit, evidence, where, ledger))
    last = max((line["round"] for line in _rounds(evidence)), default=0)
    return Kept(tuple(owners), reached, bool(owners) and 0 < last <= reached)


def _owner(data: bytes) -> str:
    """Whose ledger it says that it is."""
    body = parse(data.split(b"\n", 1)[0])
    owner = body.get("owner") if isinstance(body, dict) else None
    return owner if isinstance(owner, str) else "?"


def _rounds(evidence: Evidence) -> list[Line]:
    return [line for line in evidence.receipts.chain.of("ROUND") if line.sound] if evidence.receipts else []


def _compare(audit: AuditedDirectory, evidence: Evidence, where: str, ledger: Ledger) -> None:
    """The directory's ledger of the same owner is the kept one, or differs only in what came after the run."""
    owner = ledger.chain.owner
    there = evidence.ledgers.get(owner)
    if there is None:
        audit.find(owner, f"has no ledger file, but {where} is of this run: it was left out")
        return
    mine, theirs = ([line.hash for line in one.chain.lines] for one in (ledger, there))
    shared = min(len(mine), len(theirs))
    if (at := next((i for i in range(shared) if mine[i] != theirs[i]), None)) is not None:
        audit.find(owner, f"differs from {where} in line {at + 1}: another history", at + 1)
    elif evidence.finished and any(line["run"] == evidence.run for line in ledger.chain.lines[shared:]):
        audit.find(owner, f"ends at line {len(theirs)}, but {where} goes on with this run: the end was cut off")
    elif len(theirs) > shared:
        audit.note(f"{where} ends at line {shared} of {len(theirs)}: it was kept before the run's end")


def _receipts(audit: AuditedDirectory, evidence: Evidence, where: str, ledger: Ledger) -> int:
    """The kept receipts are the server's of this directory; the last round that one of them is of."""
    if evidence.receipts is None:
        if any(line["run"] == evidence.run for line in ledger.releases):
            audit.find(where, f"holds receipts of this run, but there is no {WHERE}")
        return 0
    known = {line.hash: line for line in evidence.receipts.chain.of("RECEIPT") if line.sound}
    reached = 0
    for line in ledger.releases:
        if line["run"] != evidence.run:
            continue
        if line["receipt"]["hash"] not in known or line["receipt"]["key"] != evidence.receipts.chain.key:
            audit.find(where, f"holds a receipt that is not in {WHERE}: it was cut off or written anew", line.number)
        else:
            reached = max(reached, known[line["receipt"]["hash"]]["round"])
    return reached
