"""ε and δ of every client, recomputed from the ledgers, and everything that the run claims about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlab.privacy.accounting import Event
from fedlab.privacy.audit.claims import (
    CARD,
    RESULT,
    Claim,
    check_agreement,
    check_budgets,
    check_delta,
    compare_card,
    compare_claim,
    compare_maximum,
    read_claims,
)
from fedlab.privacy.audit.directory import AuditedDirectory, Evidence
from fedlab.privacy.audit.lines import Line
from fedlab.privacy.audit.recompute import Recomputed, recompute
from fedlab.privacy.audit.rules import Ledger, real

NOTHING_KNOWN = Recomputed(math.inf, math.inf, math.inf, math.inf, math.inf)
Row = dict[str, float | int | None]


@dataclass(frozen=True)
class ClientNumbers:
    """What was claimed of one client, and what its data's ledger shows."""

    claim: Claim | None
    ledger: Ledger | None  # the one that shows what was spent on its data
    delta: float | None  # at which ε was recomputed
    found: Recomputed

    @property
    def claimed(self) -> float | None:
        """The claimed ε."""
        return self.claim.epsilon if self.claim else None

    def row(self) -> Row:
        """The client's row in the audit's result."""
        found, ledger = self.found, self.ledger
        return {
            "delta": self.delta,
            "epsilon_claimed": self.claimed,
            "epsilon_pld": found.pld,
            "epsilon_rdp": found.rdp,
            "epsilon_prv": found.prv,
            "epsilon_unamplified": found.unamplified,
            "charges": len(ledger.counted) if ledger else 0,
            "commits": len(ledger.commits) if ledger else 0,
            "releases": len(ledger.releases) if ledger else 0,
            "refusals": len(ledger.refusals) if ledger else 0,
            "runs": len({line["run"] for line in ledger.chain.lines}) if ledger else 0,
            "lines": ledger.chain.size if ledger else 0,
        }


def check_numbers(audit: AuditedDirectory, evidence: Evidence) -> tuple[dict[str, Row], float | None]:
    """Recompute every client's ε and hold ``result.json`` and ``PRIVACY.md`` against it.

    Args:
        audit: takes findings and notes.
        evidence: what the directory holds.

    Returns:
        client → its row, and the largest δ of any (None where nothing states one).
    """
    claiming = evidence.finished  # what a run that was cut off says of itself is not covered, and not looked at
    claims = _claims(audit, evidence) if claiming else {}
    receipts, ledgers = evidence.receipts, evidence.ledgers
    names = sorted((claims.keys() | set(receipts.clients if receipts else ()) | ledgers.keys()) - {"server"})
    numbers = {name: _check_client(audit, evidence, name, claims, claiming) for name in names}
    for owner in ("server",) if evidence.unit == "client" else names:
        if owner in ledgers:
            audit.findings += check_budgets(owner, ledgers[owner])
    if evidence.result and claiming:
        audit.findings += compare_maximum(evidence.result, claims)
    if claiming:
        _check_card(audit, numbers)
    deltas = [each.delta for each in numbers.values() if each.delta is not None]
    return {name: each.row() for name, each in numbers.items()}, max(deltas, default=None)


def _claims(audit: AuditedDirectory, evidence: Evidence) -> dict[str, Claim]:
    """What ``result.json`` claims."""
    claims, findings = read_claims(evidence.result)
    audit.findings += findings
    return claims


def _check_client(
    audit: AuditedDirectory, evidence: Evidence, name: str, claims: Mapping[str, Claim], claiming: bool
) -> ClientNumbers:
    ledger, claim = evidence.ledgers.get(evidence.payer(name)), claims.get(name)
    if claiming and name in evidence.ledgers and not evidence.receipts and name not in claims:
        audit.find(name, f"has a ledger, but {RESULT} does not list it")
    if ledger is None and claim is not None and (claim.participations > 0 or claim.epsilon):
        audit.find(evidence.payer(name), f"has no ledger file, but {RESULT} says that {name!a} took part")
    delta = _delta(audit, evidence, name, claim, ledger)
    found = _recomputed(ledger, delta, claim.unseen if claim else ())
    if claim is not None and claiming and evidence.unit == "example":
        charged = ledger.charges_of(evidence.run) if ledger else 0
        if claim.participations != charged:
            audit.find(
                name, f"{RESULT} says that it took part {claim.participations} times, its ledger shows {charged}"
            )
    if found.optimistic is not None:
        audit.note(
            "noise is discrete, for which RDP at integer orders holds; by PLD, were it continuous, ε ="
            f" {found.optimistic:.4f}"
        )
    elif "pld" in found.replaced or "prv" in found.replaced:
        who = " and ".join(accountant.upper() for accountant in found.replaced)
        audit.note(f"{name}: {who} cannot resolve what was charged; the RDP number stands in its place")
    if (ledger is None or ledger.bounded) and claiming:
        audit.findings += compare_claim(name, claim, found, bool(ledger and ledger.counted))
    audit.findings += check_agreement(name, found)
    return ClientNumbers(claim, ledger, delta, found)


def _recomputed(ledger: Ledger | None, delta: float | None, unseen: Sequence[Event]) -> Recomputed:
    """ε of what a ledger shows, and of what is counted beside it; infinite where a line could not be interpreted or no
    δ is known.
    """
    if not unseen and (ledger is None or (not ledger.charges and ledger.bounded)):
        return recompute([], 0.0)
    if (ledger is None or ledger.bounded) and delta is not None:
        return recompute([*(ledger.events() if ledger else ()), *unseen], delta)
    return NOTHING_KNOWN


def _delta(
    audit: AuditedDirectory, evidence: Evidence, name: str, claim: Claim | None, ledger: Ledger | None
) -> float | None:
    """The δ at which ε is recomputed: the claimed one, which must not be larger than this run's plan says; else the
    plan's.
    """
    plan = _plan(evidence, ledger) if ledger else None
    planned = real(plan["delta"]) if plan else None
    delta = claim.delta if claim is not None and claim.delta is not None else planned
    if claim is not None and claim.delta is None and ledger is not None and ledger.counted:
        audit.find(RESULT, f"claims no δ for {name!a}")
    if delta is not None and planned is not None and delta > planned * (1 + 1e-9) and plan and plan.sound:
        audit.find(name, f"{RESULT} claims ε at δ = {delta:g}, the PLAN in line {plan.number} says {planned:g}")
    if delta is not None and ledger is not None:
        findings, notes = check_delta(ledger.chain.where, delta, ledger)
        audit.findings += findings
        audit.notes += notes
    return delta


def _plan(evidence: Evidence, ledger: Ledger) -> Line | None:
    """This run's PLAN; the file's last one where the run is not known or has none."""
    receipts = evidence.receipts
    plan = ledger.plan(receipts.run) if receipts and receipts.run else None
    return plan or (ledger.plans[-1] if ledger.plans else None)


def _check_card(audit: AuditedDirectory, numbers: Mapping[str, ClientNumbers]) -> None:
    """The table of ``PRIVACY.md`` says no less than was recomputed."""
    data = audit.read(CARD)
    if data is None:
        if CARD not in audit.files.folders:
            audit.find(CARD, "is missing")
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        audit.find(CARD, "cannot be read: it is no UTF-8")
        return
    rows = {name: (each.claimed, each.delta, each.found) for name, each in numbers.items()}
    audit.findings += compare_card(text, rows)
