"""``fedlab audit RUN_DIR``: from the files of a run to a verdict, without any of the code that wrote them.

Guarantee: ``audit_run`` never raises for a damaged directory, and ``pass`` is given only if there is no finding at all.
Files are read as they lie; the audit of a run that is still going can find differences that are only a matter of time.
"""

from __future__ import annotations

import math
import re
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedlab.errors import ConfigError
from fedlab.privacy.audit.claims import RESULT, amount, load_json
from fedlab.privacy.audit.completeness import check_final, check_run
from fedlab.privacy.audit.directory import AuditedDirectory, read_evidence
from fedlab.privacy.audit.lines import Finding
from fedlab.privacy.audit.numbers import check_numbers
from fedlab.privacy.audit.receipts import WHERE, compare

Verdict = Literal["pass", "fail", "no-dp"]


@dataclass(frozen=True)
class RunAudit:
    """What the audit found. The ε are maxima over clients, δ too; None without DP or where nothing is known."""

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


def audit_run(path: Path | str, keys: Mapping[str, str] | None = None) -> RunAudit:
    """Check everything in a run directory.

    Args:
        path: the run directory.
        keys: client → Ed25519 public key (hex), published elsewhere than in the run.

    Returns:
        The verdict with everything that was found; never an exception for a damaged directory.

    Raises:
        ConfigError: there is no ``run.toml``, so it is no run directory.
    """
    began, root = time.perf_counter(), Path(path)
    if not (root / "run.toml").is_file():
        raise ConfigError(f"{str(path)!r} is no run directory: it has no run.toml")
    audit = AuditedDirectory(root)
    unit = _unit(audit)
    result = audit.read_json(RESULT) or {}
    files = {file.stem: file for file in sorted((root / "ledger").glob("*.jsonl"))}
    if unit == "none":
        return _without_dp(audit, result, files, began)
    evidence = read_evidence(audit, unit, result, files, keys)
    check_run(audit, evidence)
    if evidence.receipts:
        audit.findings += compare(evidence.receipts, evidence.ledgers)
    check_final(audit, evidence)
    per_client, delta = check_numbers(audit, evidence)
    if any(plan["noise"] == "seeded" for ledger in evidence.ledgers.values() for plan in ledger.plans):
        audit.note("noise was seeded: reproducible, hence no protection against anyone who knows or guesses the seed")
    if keys is None:
        audit.note("keys are those that the run itself names; only keys published elsewhere (--keys) show who signed")
    top = {
        key: max((row[key] or 0.0 for row in per_client.values()), default=None)
        for key in ("epsilon_pld", "epsilon_rdp", "epsilon_prv")
    }
    return RunAudit(
        "fail" if audit.findings else "pass", unit, delta, amount(result.get("epsilon")), **top,
        per_client=per_client,
        findings=tuple(dict.fromkeys(audit.findings)), notes=tuple(dict.fromkeys(audit.notes)),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def load_keys(path: Path) -> dict[str, str]:
    """A file of keys published elsewhere: one JSON object, client → 64 hex digits. Raises ConfigError."""
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


def _unit(audit: AuditedDirectory) -> str:
    """``privacy.unit`` of run.toml; if that cannot be read, the audit is as strict as for ``example``."""
    try:
        config = tomllib.loads((audit.root / "run.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        audit.find("run.toml", f"cannot be read: {error}")
        return "example"
    privacy = config.get("privacy", {})
    unit = privacy.get("unit", "none") if isinstance(privacy, dict) else None
    if unit not in ("example", "client", "none"):
        audit.find("run.toml", f"privacy.unit must be example, client or none, got {unit!a}")
        return "example"
    return str(unit)


def _without_dp(
    audit: AuditedDirectory, result: Mapping[str, Any], files: Mapping[str, Path], began: float
) -> RunAudit:
    """Without DP nothing may claim or show otherwise: ``unit = "none"`` must not hide a ledger."""
    if files:
        audit.find("run.toml", f'says privacy.unit = "none", but there are ledgers: {", ".join(map(ascii, files))}')
    if (audit.root / WHERE).exists() and b'"type":"START"' in (audit.read(WHERE) or b""):
        audit.find("run.toml", f'says privacy.unit = "none", but there is a {WHERE}')
    if result and result.get("epsilon") not in (None, "no DP"):
        audit.find(RESULT, f"claims an ε of {result['epsilon']!a} for a run without DP")
    verdict: Verdict = "fail" if audit.findings else "no-dp"
    findings, seconds = tuple(audit.findings), time.perf_counter() - began
    return RunAudit(
        verdict, "none", None, None, None, None, None, {}, findings, ("the run had no differential privacy",), seconds
    )
