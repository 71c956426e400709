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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedlab.errors import ConfigError
from fedlab.privacy.audit import claims as c
from fedlab.privacy.audit.chain import Finding, read_chain
from fedlab.privacy.audit.receipts import WHERE, Receipts, check_files, compare, read_receipts
from fedlab.privacy.audit.recompute import Recomputed, recompute
from fedlab.privacy.audit.rules import Ledger, read_ledger, real
from fedlab.privacy.audit.schema import CLIENT, SERVER

Verdict = Literal["pass", "fail", "no-dp"]
FINISHED = ("completed", "budget-exhausted")
NOTHING_KNOWN = Recomputed(math.inf, math.inf, math.inf, math.inf, math.inf)


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


@dataclass
class _Audit:
    root: Path
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def find(self, where: str, message: str) -> None:
        self.findings.append(Finding(where, None, message))

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None, with a finding unless it is just not there."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.find(name, f"cannot be read: {error.strerror}")
            return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        data = self.read(name)
        try:
            value = c.load_json(data.decode("utf-8")) if data is not None else None
        except ValueError as error:
            self.find(name, f"cannot be read: {error}")
            return None
        if value is None or not isinstance(value, dict):
            self.find(name, "is missing" if data is None else "is no JSON object")
            return None
        return value


def audit_run(path: Path | str, keys: Mapping[str, str] | None = None) -> RunAudit:
    """Check everything in a run directory. ``keys``: client → Ed25519 public key (hex), published elsewhere than in the
    run.

    Raises ConfigError if there is no ``run.toml``, for then it is no run directory.
    """
    began, root = time.perf_counter(), Path(path)
    if not (root / "run.toml").is_file():
        raise ConfigError(f"{str(path)!r} is no run directory: it has no run.toml")
    audit = _Audit(root)
    unit = _unit(audit)
    result = audit.read_json(c.RESULT) or {}
    files = {file.stem: file for file in sorted((root / "ledger").glob("*.jsonl"))}
    if unit == "none":
        return _without_dp(audit, result, files, began)
    receipts, ledgers = _files(audit, files, keys)
    status = str(result.get("status"))
    _run_lines(audit, receipts, ledgers, unit, status)
    audit.findings += compare(receipts, ledgers) if receipts else []
    if receipts and receipts.final:
        _final(audit, receipts, result)
    per_client, delta = _numbers(audit, result, ledgers, receipts, unit)
    seeded = [plan for ledger in ledgers.values() for plan in ledger.plans if plan["noise"] == "seeded"]
    if seeded:
        audit.notes.append(
            "noise was seeded: reproducible, hence no protection against anyone who knows or guesses the seed"
        )
    if keys is None:
        audit.notes.append(
            "keys are those that the run itself names; only keys published elsewhere (--keys) show who signed"
        )
    top = {
        key: max((row[key] or 0.0 for row in per_client.values()), default=None)
        for key in ("epsilon_pld", "epsilon_rdp", "epsilon_prv")
    }
    return RunAudit(
        "fail" if audit.findings else "pass", unit, delta, c.amount(result.get("epsilon")), **top,
        per_client=per_client,
        findings=tuple(dict.fromkeys(audit.findings)), notes=tuple(dict.fromkeys(audit.notes)),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def load_keys(path: Path) -> dict[str, str]:
    """A file of keys published elsewhere: one JSON object, client → 64 hex digits. Raises ConfigError."""
    try:
        value = c.load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--keys {str(path)!r} cannot be read: {error}") from None
    good = isinstance(value, dict) and all(
        isinstance(key, str) and re.fullmatch("[0-9a-fA-F]{64}", key) for key in value.values()
    )
    if not good:
        raise ConfigError(f'--keys {str(path)!r} must be one JSON object, {{"client": "64 hex digits"}}')
    return dict(value)


def _unit(audit: _Audit) -> str:
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


def _without_dp(audit: _Audit, result: Mapping[str, Any], files: Mapping[str, Path], began: float) -> RunAudit:
    """Without DP nothing may claim or show otherwise: ``unit = "none"`` must not hide a ledger."""
    if files:
        audit.find("run.toml", f'says privacy.unit = "none", but there are ledgers: {", ".join(map(ascii, files))}')
    if (audit.root / WHERE).exists() and b'"type":"START"' in (audit.read(WHERE) or b""):
        audit.find("run.toml", f'says privacy.unit = "none", but there is a {WHERE}')
    if result and result.get("epsilon") not in (None, "no DP"):
        audit.find(c.RESULT, f"claims an ε of {result['epsilon']!a} for a run without DP")
    verdict: Verdict = "fail" if audit.findings else "no-dp"
    findings, seconds = tuple(audit.findings), time.perf_counter() - began
    return RunAudit(
        verdict, "none", None, None, None, None, None, {}, findings, ("the run had no differential privacy",), seconds
    )


def _files(
    audit: _Audit, files: Mapping[str, Path], keys: Mapping[str, str] | None
) -> tuple[Receipts | None, dict[str, Ledger]]:
    """Read receipts.jsonl and every ledger, and check whose keys they are signed with."""
    published = keys or {}
    data, receipts = audit.read(WHERE), None
    if data is not None:
        receipts = read_receipts(read_chain(data, WHERE, "server", SERVER, "START", published.get("server")))
        audit.findings += receipts.findings
    named = dict(receipts.clients) if receipts else {}
    if receipts and receipts.start:
        named["server"] = receipts.chain.key or ""
    ledgers = {}
    for name, file in files.items():
        if (raw := audit.read(file.relative_to(audit.root).as_posix())) is None:
            continue
        ledger = ledgers[name] = read_ledger(
            read_chain(raw, name, name, CLIENT, "PLAN", published.get(name) or named.get(name))
        )
        audit.findings += ledger.findings
        if receipts and receipts.start and not ledger.chain.swapped and ledger.chain.key not in (None, named.get(name)):
            where = (
                "START names no such client"
                if name not in named
                else "it is signed with another key than START names for this client"
            )
            audit.find(name, f"{where} ({WHERE} line {receipts.start.number})")
    for name in sorted(named.keys() | ledgers.keys()) if keys is not None else ():
        used = {key for key in (named.get(name), ledgers[name].chain.key if name in ledgers else None) if key}
        if name not in published and name != "server":
            audit.find(name, "no key was published for this client")
        elif name in published and used - {published[name].lower()}:
            audit.find(name, "the key is not the one that was published")
    return receipts, ledgers


def _run_lines(audit: _Audit, receipts: Receipts | None, ledgers: Mapping[str, Ledger], unit: str, status: str) -> None:
    """Everything is of one run, with one unit, and the server's file is there and complete as far as the run got."""
    environment = audit.read_json("environment.json") or {}
    run = environment.get("run_id")
    if environment and not isinstance(run, str):
        audit.find("environment.json", "has no run_id, so no ledger line can be assigned to this run")
    if receipts and receipts.start:
        if receipts.start["unit"] != unit:
            audit.find(WHERE, f"START has unit {receipts.start['unit']!r}, run.toml says {unit!r}")
        if isinstance(run, str) and receipts.run != run:
            audit.find(WHERE, f"belongs to run {receipts.run}, environment.json says {run!a}")
    run = receipts.run if receipts and receipts.run else run if isinstance(run, str) else ""
    for name, ledger in ledgers.items():
        plan = ledger.plan(run)
        if plan and plan.sound and plan["unit"] != unit and (unit == "example" or name == "server"):
            audit.findings.append(Finding(name, plan.number, f"PLAN has unit {plan['unit']!r}, run.toml says {unit!r}"))
        if receipts is None and any(line["run"] == run for line in ledger.releases) and status not in FINISHED:
            audit.find(name, f"was given receipts in this run, but there is no {WHERE}")
    if unit == "example" and "server" in ledgers:
        audit.find("server", 'has a ledger, which only a run with privacy.unit = "client" has')
    if receipts is None or receipts.start is None:
        text = "is missing" if receipts is None else "names no START, so no key is known"
        (
            audit.find(WHERE, text)
            if status in FINISHED or receipts
            else audit.notes.append(f"{WHERE} {text}: the run was {status}")
        )
    if receipts and not receipts.closed:
        text = (
            f"does not end in a FINAL, though the run was {status}"
            if status in FINISHED
            else f"has no FINAL: the run was {status}"
        )
        audit.find(WHERE, text) if status in FINISHED else audit.notes.append(f"{WHERE} {text}")


def _final(audit: _Audit, receipts: Receipts, result: Mapping[str, Any]) -> None:
    final = receipts.final
    assert final is not None
    audit.findings += check_files(audit.root, final)
    for key, name in (("state", "adapter_digest"), ("status", "status")):
        if result and result.get(name) != final[key]:
            audit.find(c.RESULT, f"{name} is not {key} of FINAL ({WHERE} line {final.number})")


def _numbers(
    audit: _Audit, result: Mapping[str, Any], ledgers: Mapping[str, Ledger], receipts: Receipts | None, unit: str
) -> tuple[dict[str, dict[str, float | int | None]], float | None]:
    """ε per client, recomputed, and everything that was claimed about it."""
    claims, findings = c.read_claims(result) if result else ({}, [])
    ended = str(result.get("status")) in FINISHED
    if findings and not ended:
        audit.notes.append(f"{c.RESULT} claims no ε: the run was {result.get('status')}")
    else:
        audit.findings += findings
    names = sorted((claims.keys() | set(receipts.clients if receipts else ()) | ledgers.keys()) - {"server"})
    rows: dict[str, dict[str, float | int | None]] = {}
    card: dict[str, tuple[float | None, float | None, Recomputed]] = {}
    for name in names:
        ledger, claim = ledgers.get("server" if unit == "client" else name), claims.get(name)
        if name in ledgers and not receipts and result and name not in claims:
            audit.find(name, f"has a ledger, but {c.RESULT} does not list it")
        if ledger is None and claim is not None and (claim.participations > 0 or claim.epsilon):
            audit.find(
                "server" if unit == "client" else name,
                f"has no ledger file, but {c.RESULT} says that {name!a} took part",
            )
        delta = _delta(audit, name, claim, ledger, receipts)
        found = NOTHING_KNOWN
        if ledger is None or (not ledger.charges and ledger.bounded):
            found = recompute([], 0.0)
        elif ledger.bounded and delta is not None:
            found = recompute(ledger.events(), delta)
        if "pld" in found.replaced or "prv" in found.replaced:
            who = " and ".join(name.upper() for name in found.replaced)
            audit.notes.append(f"{name}: {who} cannot resolve what was charged; the RDP number stands in its place")
        if (ledger is None or ledger.bounded) and (claims or ended):
            audit.findings += c.compare_claim(name, claim, found, bool(ledger and ledger.counted))
        audit.findings += c.check_agreement(name, found)
        card[name] = (claim.epsilon if claim else None, delta, found)
        rows[name] = _row(delta, claim, found, ledger)
    for name in ("server",) if unit == "client" else names:
        if name in ledgers:
            audit.findings += c.check_budgets(name, ledgers[name])
    if result and (claims or ended):
        audit.findings += c.compare_maximum(result, claims)
    _card(audit, card, ended)
    return rows, max((value for _, value, _ in card.values() if value is not None), default=None)


def _delta(
    audit: _Audit, name: str, claim: c.Claim | None, ledger: Ledger | None, receipts: Receipts | None
) -> float | None:
    """The δ at which ε is recomputed: the claimed one, which must not be larger than this run's plan says; else the
    plan's.
    """
    plan = None
    if ledger is not None:
        plan = ledger.plan(receipts.run) if receipts and receipts.run else None
        plan = plan or (ledger.plans[-1] if ledger.plans else None)
    planned = real(plan["delta"]) if plan else None
    delta = claim.delta if claim is not None and claim.delta is not None else planned
    if claim is not None and claim.delta is None and ledger is not None and ledger.counted:
        audit.find(c.RESULT, f"claims no δ for {name!a}")
    if delta is not None and planned is not None and delta > planned * (1 + 1e-9) and plan and plan.sound:
        audit.find(name, f"{c.RESULT} claims ε at δ = {delta:g}, the PLAN in line {plan.number} says {planned:g}")
    if delta is not None and ledger is not None:
        findings, notes = c.check_delta(ledger.chain.where, delta, ledger)
        audit.findings, audit.notes = [*audit.findings, *findings], [*audit.notes, *notes]
    return delta


def _row(
    delta: float | None, claim: c.Claim | None, found: Recomputed, ledger: Ledger | None
) -> dict[str, float | int | None]:
    return {
        "delta": delta,
        "epsilon_claimed": claim.epsilon if claim else None,
        "epsilon_pld": found.pld,
        "epsilon_rdp": found.rdp,
        "epsilon_prv": found.prv,
        "epsilon_unamplified": found.unamplified,
        "charges": len(ledger.counted) if ledger else 0,
        "commits": len(ledger.commits) if ledger else 0,
        "releases": len(ledger.releases) if ledger else 0,
        "refusals": ledger.refusals if ledger else 0,
        "runs": len({line["run"] for line in ledger.chain.lines}) if ledger else 0,
        "lines": ledger.chain.size if ledger else 0,
    }


def _card(audit: _Audit, numbers: Mapping[str, tuple[float | None, float | None, Recomputed]], ended: bool) -> None:
    data = audit.read(c.CARD)
    if data is None:
        if ended and not (audit.root / c.CARD).exists():
            audit.find(c.CARD, "is missing")
        return
    try:
        audit.findings += c.compare_card(data.decode("utf-8"), numbers)
    except UnicodeDecodeError:
        audit.find(c.CARD, "cannot be read: it is no UTF-8")


def render(audit: RunAudit) -> str:
    """The human form: verdict, table, findings, notes."""
    heads = {
        "pass": "PASS: ledgers, receipts and claims agree",
        "fail": f"FAIL: {len(audit.findings)} finding{'s' if len(audit.findings) != 1 else ''}",
        "no-dp": "NO DP: the run had no differential privacy, so there is nothing to verify",
    }
    lines = [heads[audit.verdict]]
    if audit.per_client:
        top = [_number(x) for x in (audit.epsilon_claimed, audit.epsilon_pld, audit.epsilon_rdp, audit.epsilon_prv)]
        lines.append("ε (worst client): claimed {}, recomputed {} (PLD), {} (RDP), {} (PRV)".format(*top))
        columns = ("delta", "epsilon_claimed", "epsilon_pld", "epsilon_rdp", "epsilon_prv", "epsilon_unamplified")
        counts = ("charges", "commits", "releases", "refusals", "runs", "lines")
        table = [["client", "δ", "claimed", "PLD", "RDP", "PRV", "unamplified", *counts]]
        for name, row in audit.per_client.items():
            shown = Finding(name, None, "")
            table.append([str(shown)[:-2], *(_number(row[key]) for key in columns), *(str(row[key]) for key in counts)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        body = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        lines += ["", *body, ""]
    lines += [str(finding) for finding in audit.findings]
    lines += [f"note: {note}" for note in audit.notes]
    return "\n".join([*lines, f"{audit.seconds:.1f} s"]).encode("utf-8", "backslashreplace").decode("utf-8")


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value >= 1e-3 else f"{value:.3g}"
