"""The human form of an audit."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Decimal

from fedlab.privacy.audit.lines import Finding
from fedlab.privacy.audit.run import RunAudit, Verdict

COLUMNS = ("delta", "epsilon_claimed", "epsilon_pld", "epsilon_rdp", "epsilon_prv", "epsilon_unamplified")
COUNTS = ("charges", "commits", "releases", "refusals", "runs", "lines")
HEADS = {
    "verified": "VERIFIED: complete, sealed, and signed as what is kept elsewhere says",
    "consistent": (
        "CONSISTENT: it fits together. Whoever can write this directory could have made all of it, keys included;"
        " --keys FILE or --kept FILE hold it against what lies elsewhere"
    ),
    "incomplete": (
        "INCOMPLETE: the run did not come to its end. This vouches for no adapter and for nothing that the run says;"
        " ε is what the ledgers here show"
    ),
    "no-dp": "NO DP: the run had no differential privacy, so there is nothing to verify",
}


def render(audit: RunAudit) -> str:
    """Verdict, table of clients, findings, notes and what is not covered, as text for a terminal."""
    lines = [headed(audit.verdict, len(audit.findings))]
    if audit.per_client:
        found = zip(("PLD", "RDP", "PRV"), (audit.epsilon_pld, audit.epsilon_rdp, audit.epsilon_prv), strict=True)
        shown = "recomputed " + ", ".join(f"{_number(value)} ({name})" for name, value in found)
        claimed = "" if audit.epsilon_claimed is None else f"claimed {_number(audit.epsilon_claimed)}, "
        lines.append(f"ε (worst client): {claimed}{shown}")
        lines += ["", *_table(audit), ""]
    lines += [str(finding) for finding in audit.findings]
    lines += [f"note: {note}" for note in audit.notes]
    lines += [f"not covered: {str(Finding(text, None, ''))[:-2]}" for text in audit.not_covered]
    return "\n".join([*lines, f"{audit.seconds:.1f} s"]).encode("utf-8", "backslashreplace").decode("utf-8")


def headed(verdict: Verdict, findings: int) -> str:
    """What is said first of all: the verdict, and what it does not say."""
    failed = f"FAILED: {findings} finding{'s' if findings != 1 else ''}; nothing below is vouched for"
    return HEADS.get(verdict, failed)


def _table(audit: RunAudit) -> list[str]:
    table = [["client", "δ", "claimed", "PLD", "RDP", "PRV", "unamplified", *COUNTS]]
    for name, row in audit.per_client.items():
        shown = str(Finding(name, None, ""))[:-2]  # as findings spell it, without the colon
        table.append([shown, *(_number(row[key]) for key in COLUMNS), *(str(row[key]) for key in COUNTS)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


def _number(value: float | int | None) -> str:
    """Rounded up, as every ε is."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if value < 1e-3:
        return f"{value:.3g}"
    return f"{Decimal(value).quantize(Decimal('0.0001'), rounding=ROUND_CEILING):f}"
