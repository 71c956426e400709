"""What the server's last line seals: every file of a finished run is under it, or is named as not covered.

``PRIVACY.md`` and ``report.html`` may be written anew after the seal; they count if they are what the sealed files make
(``regenerated``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlab.privacy.audit.claims import CARD, RESULT
from fedlab.privacy.audit.directory import AuditedDirectory, Evidence
from fedlab.privacy.audit.files import TABLE, Unreadable
from fedlab.privacy.audit.lines import Line
from fedlab.privacy.audit.receipts import WHERE

REPORT, EMPIRICAL = "report.html", "empirical.json"
REWRITTEN = (CARD, REPORT)  # after the seal: by an empirical audit, and by ``fedlab report``
SEALED = (RESULT, "run.toml", "environment.json", "metrics.jsonl", CARD)  # what no seal may leave out
OPEN = {
    "log.txt": "the log",
    "tensorboard": "event files",
    "bases": "what came to clients once",
    EMPIRICAL: "the empirical audit's result, and what PRIVACY.md quotes of it",
}
# The run directory and result.json → the texts of files that follow from the others, by name.
Regenerate = Callable[[Path, Mapping[str, Any]], Mapping[str, str]]


def check_coverage(audit: AuditedDirectory, evidence: Evidence, regenerate: Regenerate | None) -> None:
    """Compare every file with the seal, and name what is not under it."""
    final = evidence.receipts.final if evidence.receipts else None
    if not evidence.finished:
        _unfinished(audit, final)
        return
    if final is None:
        return
    for key, name in (("state", "adapter_digest"), ("status", "status")):
        if evidence.result and evidence.result.get(name) != final[key]:
            audit.find(RESULT, f"{name} is not {key} of FINAL ({WHERE} line {final.number})")
    for name in SEALED:
        if name not in final["files"]:
            audit.find(name, f"is not among the files that FINAL names ({WHERE} line {final.number})")
    if not any(name.startswith("adapter/") for name in final["files"]):
        audit.find("adapter", f"is not among the files that FINAL names ({WHERE} line {final.number})")
    for name in sorted(final["files"].keys() - set(REWRITTEN)):
        _compare(audit, name, final["files"][name], {})
    made = _made_again(audit, evidence, regenerate)
    for name in sorted({*REWRITTEN, *made} & {*final["files"], *made}):
        _compare(audit, name, final["files"].get(name), made)
    _name_uncovered(audit, evidence, final, made)


def _unfinished(audit: AuditedDirectory, final: Line | None) -> None:
    """Of a run that was cut off nothing is sealed, so no adapter may lie there as if it were the run's."""
    for name in audit.files.under("adapter"):
        sealed = final["files"].get(name) if final else None
        if sealed is None:
            audit.find(name, "an adapter without its seal: the run did not finish, and nothing vouches for it")
        else:
            _compare(audit, name, sealed, {})
    audit.leave("everything but the ledgers: the run did not finish, so nothing is sealed")


def _compare(audit: AuditedDirectory, name: str, sealed: list[Any] | None, made: Mapping[str, str]) -> None:
    """One file with the seal, and with what the sealed files make; what may be written anew, with that alone."""
    if name not in audit.files:
        audit.find(name, "is missing, FINAL names it")
        return
    right = sealed is None or (audit.files.sizes[name] == sealed[0] and _sha256(audit, name) == sealed[1])
    if not right and not (name in made and name in REWRITTEN):
        audit.find(name, "was changed: its size or SHA-256 is not the one in FINAL")
    if name not in made or (text := audit.read(name, TABLE)) == made[name].encode():
        return
    if name == REPORT and right and sealed and text and _words(text.decode("utf-8", "replace")) == _words(made[name]):
        audit.leave(f"{name}: its figures, drawn by other software than is here")
        return
    audit.find(name, "is not what this run's sealed files and ledgers make: it was edited, or another version wrote it")


def _words(page: str) -> str:
    """A page without its figures."""
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def _sha256(audit: AuditedDirectory, name: str) -> str:
    try:
        return audit.files.sha256(name)
    except (Unreadable, OSError) as error:
        return f"cannot be read: {error}"


def _made_again(audit: AuditedDirectory, evidence: Evidence, regenerate: Regenerate | None) -> Mapping[str, str]:
    """Texts of the files that follow from the others; none while those are not what they were."""
    made: Mapping[str, str] = {}
    try:
        if regenerate is not None and not audit.findings:
            made = regenerate(audit.root, evidence.result)
        if not made:
            audit.leave(f"{CARD}'s sentences and {REPORT} beyond their seal: only the table was compared")
        return made
    except Exception as error:  # whatever a forged file makes the product's code do is a finding
        audit.find(RESULT, f"the statement cannot be made from these files ({type(error).__name__})")
        return {}


def _name_uncovered(audit: AuditedDirectory, evidence: Evidence, final: Line, made: Mapping[str, str]) -> None:
    known = {*final["files"], *made, WHERE, *(f"ledger/{name}.jsonl" for name in evidence.ledgers)}
    rest = {}
    for name in sorted(set(audit.files.sizes) - known):
        top = name.partition("/")[0]
        if top in ("adapter", "adapter.unsealed"):
            audit.find(name, "is not among the files that FINAL names")
        elif top in OPEN:
            rest[top] = OPEN[top]
        else:
            rest[name] = "no part of the run"
    for name, what in rest.items():
        audit.leave(f"{name}: {what}")
