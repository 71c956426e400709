"""``fedlab audit RUN_DIR``: from the files of a run to a verdict, without any of the code that wrote them.

Guarantee: ``audit_run`` never raises for a damaged directory and never waits. With any finding the verdict is
``failed``. Files are read as they lie; the audit of a run that is still going can find differences that are only a
matter of time.
"""

from __future__ import annotations

import math
import re
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedlab.errors import ConfigError
from fedlab.privacy.audit.claims import RESULT, amount, load_json
from fedlab.privacy.audit.completeness import check_run, unclosed
from fedlab.privacy.audit.coverage import Regenerate, check_coverage
from fedlab.privacy.audit.directory import (
    FINISHED,
    AuditedDirectory,
    Evidence,
    ledger_names,
    read_evidence,
    read_result,
)
from fedlab.privacy.audit.files import TABLE
from fedlab.privacy.audit.kept import Kept, check_kept
from fedlab.privacy.audit.lines import Finding
from fedlab.privacy.audit.memorisation import check_memorisation
from fedlab.privacy.audit.numbers import Row, check_numbers
from fedlab.privacy.audit.receipts import WHERE, compare
from fedlab.privacy.audit.rounds import check_rounds
from fedlab.privacy.audit.shares import check_shares
from fedlab.privacy.audit.tensors import check_adapter
from fedlab.privacy.audit.terms import check_terms

Verdict = Literal["verified", "consistent", "incomplete", "failed", "no-dp"]


@dataclass(frozen=True)
class RunAudit:
    """What the audit found. The ε are maxima over clients, δ too; None without DP or where nothing is known.

    ``not_covered`` names what lies in the directory and is vouched for by nothing.
    """

    verdict: Verdict
    unit: str
    delta: float | None
    epsilon_claimed: float | None
    epsilon_pld: float | None
    epsilon_rdp: float | None
    epsilon_prv: float | None
    per_client: Mapping[str, Mapping[str, float | int | None]]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    not_covered: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: an infinite ε is the string ``inf``, a finding is its sentence (``client-3: line 17: …``)."""
        plain: dict[str, Any] = _strict(asdict(self) | {"findings": [str(finding) for finding in self.findings]})
        return plain


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "inf"
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_strict(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def audit_run(
    path: Path | str,
    keys: Mapping[str, str] | None = None,
    kept: Mapping[str, bytes] | None = None,
    regenerate: Regenerate | None = None,
) -> RunAudit:
    """Check everything in a run directory.

    Args:
        path: the run directory.
        keys: owner → Ed25519 public key (hex), published elsewhere than in the run: the server's and every client's.
        kept: name → bytes of ledgers that clients kept at home, with the server's receipts in them.
        regenerate: makes the files that follow from the others again; without it they are not covered but for their
            seal.

    Returns:
        The verdict with everything that was found; never an exception for a damaged directory.

    Raises:
        ConfigError: there is neither a ``run.toml`` nor what a run leaves beside it, so it is no run directory.
    """
    began, root = time.perf_counter(), Path(path)
    audit = AuditedDirectory(root)
    there = audit.files.sizes.keys() | audit.files.folders | audit.files.odd.keys()
    if not there & {"run.toml", RESULT, WHERE}:
        raise ConfigError(f"{str(path)!r} is no run directory: it has no run.toml")
    config = _config(audit)
    unit = _unit(audit, config)
    result = read_result(audit)
    if unit == "none":
        return _without_dp(audit, config, result, began)
    evidence = read_evidence(audit, unit, config, result, keys)
    check_run(audit, evidence)
    check_terms(audit, evidence)
    check_shares(audit, evidence)
    if evidence.receipts:
        audit.findings += compare(evidence.receipts, evidence.ledgers)
    if evidence.receipts and not evidence.receipts.current:
        audit.find(
            WHERE, "was written by the first edition, which sealed neither settings nor states; nothing is vouched for"
        )
    elif evidence.receipts:
        audit.findings += check_rounds(evidence.receipts, evidence.ledgers, evidence.finished)
    held = check_kept(audit, evidence, kept) if kept is not None else None
    per_client, delta = check_numbers(audit, evidence)
    if evidence.finished:
        audit.findings += check_memorisation(evidence.result, config)
    if evidence.receipts is None or evidence.receipts.current:
        check_coverage(audit, evidence, regenerate)
        check_adapter(audit, evidence)
    verdict = _verdict(audit, evidence, keys, held)
    return _summary(audit, evidence, verdict, per_client, delta, time.perf_counter() - began)


def _verdict(audit: AuditedDirectory, evidence: Evidence, keys: Mapping[str, str] | None, held: Kept | None) -> Verdict:
    """What may be said of a directory, and why it is not more."""
    if any(plan["noise"] == "seeded" for ledger in evidence.ledgers.values() for plan in ledger.plans):
        audit.note("noise was seeded: reproducible, hence no protection against anyone who knows or guesses the seed")
    audit.note("that the noise was drawn as signed no ledger can show: fedlab audit --empirical tests the code")
    if audit.findings:
        return "failed"
    if not evidence.finished:
        return "incomplete"
    audit.note("sealed but not recomputed: scores, losses, times and bytes are the server's word")
    if keys is None and held is None:
        audit.note("keys are those that the run itself names; --keys or --kept hold them against what lies elsewhere")
        return "consistent"
    if open_ends := unclosed(evidence):
        audit.note(
            f"{', '.join(open_ends)} did not sign that the run is over, so nothing shows where their ledgers end"
        )
        return "consistent"
    if keys is None and held is not None and not held.whole:
        audit.note(f"kept receipts reach round {held.round}, not the last one: what came later is not held by them")
        return "consistent"
    return "verified"


def _summary(
    audit: AuditedDirectory,
    evidence: Evidence,
    verdict: Verdict,
    per_client: Mapping[str, Row],
    delta: float | None,
    seconds: float,
) -> RunAudit:
    top = {
        key: max((row[key] or 0.0 for row in per_client.values()), default=None)
        for key in ("epsilon_pld", "epsilon_rdp", "epsilon_prv")
    }
    claimed = amount(evidence.result.get("epsilon")) if evidence.finished else None
    return RunAudit(
        verdict, evidence.unit, delta, claimed, **top,
        per_client=per_client,
        findings=tuple(dict.fromkeys(audit.findings)), notes=tuple(dict.fromkeys(audit.notes)),
        not_covered=tuple(dict.fromkeys(audit.uncovered)), seconds=seconds,
    )  # fmt: skip


def load_keys(path: Path) -> dict[str, str]:
    """A file of keys published elsewhere: one JSON object, owner → 64 hex digits. Raises ConfigError."""
    try:
        value = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--keys {str(path)!r} cannot be read: {error}") from None
    good = isinstance(value, dict) and all(
        isinstance(key, str) and re.fullmatch("[0-9a-fA-F]{64}", key) for key in value.values()
    )
    if not good:
        raise ConfigError(f'--keys {str(path)!r} must be one JSON object, {{"client": "64 hex digits"}}')
    return dict(value)


def load_kept(paths: Sequence[Path]) -> dict[str, bytes]:
    """Ledgers that clients kept. Raises ConfigError for one that cannot be read."""
    found = {}
    for path in paths:
        try:
            found[f"kept {path.name}" if len(paths) == 1 else f"kept {path}"] = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"--kept {str(path)!r} cannot be read: {error.strerror}") from None
    return found


def _config(audit: AuditedDirectory) -> Mapping[str, Any]:
    """``run.toml``; empty, with a finding, if it cannot be read."""
    data = audit.read("run.toml")
    if data is None:
        if "run.toml" not in audit.files.odd and "run.toml" not in audit.files.folders:
            audit.find("run.toml", "is missing")
        return {}
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        audit.find("run.toml", f"cannot be read: {error}")
        return {}


def _unit(audit: AuditedDirectory, config: Mapping[str, Any]) -> str:
    """``privacy.unit`` of run.toml; if that cannot be read, the audit is as strict as for ``example``."""
    if not config:
        if not audit.findings:
            audit.find("run.toml", "is empty")
        return "example"
    privacy = config.get("privacy", {})
    unit = privacy.get("unit", "none") if isinstance(privacy, dict) else None
    if unit not in ("example", "client", "none"):
        audit.find("run.toml", f"privacy.unit must be example, client or none, got {unit!a}")
        return "example"
    return str(unit)


def _without_dp(
    audit: AuditedDirectory, config: Mapping[str, Any], result: Mapping[str, Any], began: float
) -> RunAudit:
    """Without DP nothing may claim or show otherwise: ``unit = "none"`` must not hide a ledger."""
    if names := ledger_names(audit.files):
        audit.find("run.toml", f'says privacy.unit = "none", but there are ledgers: {", ".join(map(ascii, names))}')
    if b'"type":"START"' in (audit.read(WHERE, TABLE) or b""):
        audit.find("run.toml", f'says privacy.unit = "none", but there is a {WHERE}')
    if result and result.get("epsilon") not in (None, "no DP"):
        audit.find(RESULT, f"claims an ε of {result['epsilon']!a} for a run without DP")
    if result.get("status") in FINISHED:
        audit.findings += check_memorisation(result, config)
    verdict: Verdict = "failed" if audit.findings else "no-dp"
    return RunAudit(
        verdict, "none", None, None, None, None, None, {}, tuple(audit.findings),
        ("the run had no differential privacy",), ("everything: a run without DP has no seal",),
        time.perf_counter() - began,
    )  # fmt: skip
