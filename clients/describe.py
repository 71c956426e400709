"""What a client says about itself before the first round, and what it keeps after each: declarations and receipts."""

from __future__ import annotations

import json
from typing import Any, cast

from flwr.app import ConfigRecord, Context, RecordDict

from clients.account import ClientAccount, code_versions
from fedlab.errors import PrivacyError
from fedlab.session import Session

# id, size; one round's DP event and δ; public key and whole ledger; why it will not take part ("" if it will)
DESCRIPTION = ("ids", "examples", "sampler", "q", "sigma", "steps", "delta", "keys", "lines", "refusals")
NO_EVENT = {
    "sampler": "none",
    "q": 0.0,
    "sigma": 0.0,
    "steps": 0,
    "delta": 0.0,
    "keys": "",
    "lines": "",
    "refusals": "",
}


def describe_client(session: Session, client: str, order: ConfigRecord, context: Context) -> dict[str, Any]:
    """One client's row of the answer. Under DP it signs the plan of this run, or says why it will not."""
    row: dict[str, Any] = {**NO_EVENT, "ids": client, "examples": session.data.size(client)}
    plan = session.plan(client)
    if plan is None:
        return row
    event = plan.event()
    row |= {"sampler": event.sampler, "q": event.q, "sigma": event.sigma, "steps": event.steps, "delta": plan.delta}
    try:
        account = ClientAccount(session, client, order, context)
        refusal = account.guard.plan(account.terms, code_versions())
        row |= {"keys": account.guard.ledger.public, "lines": account.lines_after(0), "refusals": str(refusal or "")}
    except PrivacyError as error:
        row["refusals"] = str(error)
    return row


def keep_receipts(session: Session, cohort: list[str], content: RecordDict, context: Context) -> RecordDict:
    """Reply to a release message: the ledgers' new lines, after the receipts in it were kept."""
    order = content.config_records["round"]
    lines: dict[str, str] = {}
    failures: dict[str, str] = {}
    for client, known, receipt in zip(
        cohort, cast(list[int], order["known"]), cast(list[str], order["receipts"]), strict=True
    ):
        try:
            account = ClientAccount(session, client, order, context)
            if receipt:
                account.guard.release(json.loads(receipt))
            lines[client] = account.lines_after(known)
        except (PrivacyError, ValueError) as error:
            failures[client] = str(error)
    return RecordDict(
        {
            "charges": ConfigRecord({"ids": list(lines), "lines": list(lines.values())}),
            "failures": ConfigRecord({"ids": list(failures), "reasons": list(failures.values())}),
        }
    )
