"""What ``result.json`` and ``PRIVACY.md`` claim, held against the recomputed ε."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedlab.privacy.accounting import Event
from fedlab.privacy.audit.lines import Finding
from fedlab.privacy.audit.recompute import Recomputed, recompute
from fedlab.privacy.audit.rules import Ledger, real
from fedlab.privacy.audit.schema import EVENT

RESULT, CARD = "result.json", "PRIVACY.md"


@dataclass(frozen=True)
class Claim:
    """What ``result.json`` says about one client. None: it does not say, or no number."""

    epsilon: float | None
    delta: float | None
    participations: int
    unseen: tuple[Event, ...] = ()  # counted as spent although no ledger shows it


def load_json(text: str) -> Any:
    """Strict JSON: no NaN, no Infinity, no key twice (of which people read the one and parsers the other).

    Raises ValueError.
    """

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if (
            twice := next((name for name in names if names.count(name) > 1), None)
            if len(set(names)) < len(names)
            else None
        ):
            raise ValueError(f"the key {twice[:40]!a} is there twice")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def amount(value: Any) -> float | None:
    """An ε as JSON holds it: a number, or the string ``inf``. None for anything else."""
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return math.inf
    return found if found >= 0 else None


def read_claims(result: Mapping[str, Any]) -> tuple[dict[str, Claim], list[Finding]]:
    """``result.clients``, tolerant of every form."""
    clients, findings = result.get("clients"), []
    if not isinstance(clients, dict):
        return {}, [Finding(RESULT, None, "has no object `clients`, so nothing says what each of them spent")]
    claims = {}
    for name, entry in clients.items():
        entry = entry if isinstance(entry, dict) else {}
        delta = amount(entry.get("delta"))
        if delta is not None and delta > 1:
            findings.append(Finding(RESULT, None, f"clients.{name!a}.delta must be in [0, 1], got {delta}"))
            delta = None
        took_part = amount(entry.get("participations"))
        count = 0 if took_part is None else math.ceil(min(took_part, 2**53))
        unseen = _unseen(entry.get("unseen", []))
        if unseen is None:
            findings.append(Finding(RESULT, None, f"clients.{name!a}.unseen is no list of events"))
        claims[name] = Claim(amount(entry.get("epsilon")), delta, count, unseen or ())
    return claims, findings


def _unseen(value: Any) -> tuple[Event, ...] | None:
    """Events as ``result.json`` holds them; None for anything else."""
    if not isinstance(value, list) or any(EVENT(entry) for entry in value):
        return None
    return tuple(Event(e["sampler"], real(e["q"]), real(e["sigma"]), e["steps"]) for e in value)


def compare_claim(name: str, claim: Claim | None, found: Recomputed, spent: bool) -> Iterator[Finding]:
    """A client's claimed ε against the recomputed one.

    Lower is a broken promise; much higher means that lines are missing.
    """
    if claim is None:
        if spent:
            yield Finding(RESULT, None, f"does not list {name!a}, whose ledger has charges")
    elif claim.epsilon is None:
        yield Finding(RESULT, None, f"claims no ε for {name!a}; the ledger shows {found.pld:.4f}")
    elif claim.epsilon < found.pld * (1 - 1e-4) - 1e-6:
        yield Finding(
            name,
            None,
            f"{RESULT} claims less than the ledger shows: ε = {claim.epsilon:.4f}, recomputed {found.pld:.4f}",
        )
    elif claim.epsilon > found.ceiling * 1.02 + 1e-3:
        text = (
            f"{RESULT} claims more than the ledger shows: ε = {claim.epsilon:.4f}, recomputed {found.pld:.4f}; are"
            " lines missing?"
        )
        yield Finding(name, None, text)


def compare_maximum(result: Mapping[str, Any], claims: Mapping[str, Claim]) -> Iterator[Finding]:
    """``epsilon`` is the maximum over clients, never a mean."""
    claimed, each = (
        amount(result.get("epsilon")),
        [claim.epsilon for claim in claims.values() if claim.epsilon is not None],
    )
    if claimed is None:
        yield Finding(RESULT, None, "claims no ε")
    elif each and not math.isclose(claimed, max(each), rel_tol=1e-9, abs_tol=1e-12):
        yield Finding(RESULT, None, f"epsilon = {claimed:.4f} is not the maximum over clients, {max(each):.4f}")


def compare_card(card: str, numbers: Mapping[str, tuple[float | None, float | None, Recomputed]]) -> Iterator[Finding]:
    """The rows of ``PRIVACY.md``; ``numbers``: per client its claimed ε, its δ, and the recomputed ε."""
    rows: dict[str, list[tuple[int, list[str]]]] = {}
    for line, text in enumerate(card.split("\n"), start=1):
        if text.lstrip().startswith("|"):
            cells = [cell.strip().strip("`*").strip() for cell in re.split(r"(?<!\\)\|", text.strip())[1:]]
            rows.setdefault(cells[0].replace("\\|", "|"), []).append((line, cells))
    for name, (claimed, delta, found) in numbers.items():
        shown = [(line, _shown(cells[1]), _shown(cells[2])) for line, cells in rows.get(name, []) if len(cells) > 2]
        if not shown:
            yield Finding(CARD, None, f"has no row for {name!a}")
        for line, epsilon, said in shown:
            if epsilon is None:
                yield Finding(CARD, line, f"the row of {name!a} has no ε")
            elif epsilon < found.pld * (1 - 1e-4) - 1e-6 or (claimed is not None and epsilon < claimed):
                most = max(found.pld, claimed or 0)
                yield Finding(
                    CARD, line, f"says ε = {epsilon:g} for {name!a}, which is below {most:.6f}: it must be rounded up"
                )
            elif epsilon > found.ceiling * 1.02 + 1e-3 + 1e-4:
                yield Finding(CARD, line, f"says ε = {epsilon:g} for {name!a}, recomputed {found.pld:.4f}")
            if delta is not None and (
                said is None or not math.isclose(said, delta, rel_tol=0.1)
            ):  # it may be printed with one digit
                yield Finding(
                    CARD, line, f"says δ = {'nothing' if said is None else said} for {name!a}, {RESULT} says {delta:g}"
                )


def _shown(cell: str) -> float | None:
    if cell in ("inf", "∞"):
        return math.inf
    try:
        value = float(cell) if re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", cell, re.ASCII) else math.nan
    except ValueError:
        return None
    return value if value >= 0 else None


def check_budgets(name: str, ledger: Ledger) -> Iterator[Finding]:
    """Up to the last charge of each run, everything in the file fits into the budget that the run's PLAN states."""
    for plan in ledger.plans:
        of_run = [line for line in ledger.counted if line["run"] == plan["run"]]
        if not plan.sound or plan["budget"] is None or not of_run:
            continue
        most, delta = real(plan["budget"]["epsilon"]), real(plan["budget"]["delta"])
        spent = recompute(ledger.events(until=of_run[-1]), delta).pld
        if spent > most * (1 + 1e-6):
            yield Finding(
                name,
                plan.number,
                f"the budget was exceeded: ε = {spent:.4f} at δ = {delta:g} was spent, the PLAN allows {most:g}",
            )


def check_agreement(name: str, found: Recomputed) -> Iterator[Finding]:
    """Three accountants that know nothing of each other must agree where theory says so."""
    if math.isinf(found.pld) or math.isinf(found.rdp):
        return
    if found.optimistic is not None and found.optimistic > found.pld * (1 + 1e-3) + 1e-3:
        yield Finding(name, None, f"accountants disagree: PLD {found.optimistic:.6f} is above RDP {found.pld:.6f}")
    if found.pld > found.rdp * (1 + 1e-6) + 1e-9:
        yield Finding(name, None, f"accountants disagree: PLD {found.pld:.6f} is above RDP {found.rdp:.6f}")
    if not found.replaced and abs(found.prv - found.pld) > 0.03 + 0.03 * found.pld:
        yield Finding(name, None, f"accountants disagree: PRV {found.prv:.4f}, PLD {found.pld:.4f}")


def check_delta(name: str, delta: float, ledger: Ledger) -> tuple[list[Finding], list[str]]:
    """δ·n ≥ 1 allows to publish a whole record; above 0.1 it says little."""
    n = max((plan["n"] for plan in ledger.plans), default=0)
    if delta * n >= 1:
        return [
            Finding(
                name,
                None,
                f"δ·n = {delta * n:.3g} is not below 1 (δ = {delta:g}, n = {n}): one record could be published whole",
            )
        ], []
    return [], (
        [f"{name}: δ·n = {delta * n:.3g} is above 0.1; a smaller δ would promise more"] if delta * n > 0.1 else []
    )
