"""The human form of an audit."""

from __future__ import annotations

from fedlab.privacy.audit.lines import Finding
from fedlab.privacy.audit.run import RunAudit

COLUMNS = ("delta", "epsilon_claimed", "epsilon_pld", "epsilon_rdp", "epsilon_prv", "epsilon_unamplified")
COUNTS = ("charges", "commits", "releases", "refusals", "runs", "lines")


def render(audit: RunAudit) -> str:
    """Verdict, table of clients, findings and notes, as text for a terminal."""
    heads = {
        "pass": "PASS: ledgers, receipts and claims agree",
        "fail": f"FAIL: {len(audit.findings)} finding{'s' if len(audit.findings) != 1 else ''}",
        "no-dp": "NO DP: the run had no differential privacy, so there is nothing to verify",
    }
    lines = [heads[audit.verdict]]
    if audit.per_client:
        top = [_number(x) for x in (audit.epsilon_claimed, audit.epsilon_pld, audit.epsilon_rdp, audit.epsilon_prv)]
        lines.append("ε (worst client): claimed {}, recomputed {} (PLD), {} (RDP), {} (PRV)".format(*top))
        lines += ["", *_table(audit), ""]
    lines += [str(finding) for finding in audit.findings]
    lines += [f"note: {note}" for note in audit.notes]
    return "\n".join([*lines, f"{audit.seconds:.1f} s"]).encode("utf-8", "backslashreplace").decode("utf-8")


def _table(audit: RunAudit) -> list[str]:
    table = [["client", "δ", "claimed", "PLD", "RDP", "PRV", "unamplified", *COUNTS]]
    for name, row in audit.per_client.items():
        shown = str(Finding(name, None, ""))[:-2]  # as findings spell it, without the colon
        table.append([shown, *(_number(row[key]) for key in COLUMNS), *(str(row[key]) for key in COUNTS)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value >= 1e-3 else f"{value:.3g}"
