"""What follows from the other files of a run, made again: ``fedlab audit`` compares it byte by byte.

The auditor in ``fedlab.privacy.audit`` shares no code with the side that writes; it has judged the ledgers and their
numbers before this is asked. Here the product's own sentences, numbers and page are made from those same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fedlab.config import RunConfig
from fedlab.privacy.ledger.claims import privacy_claims
from fedlab.privacy.ledger.ledger import SERVER, Entry, event_of, parse_lines
from fedlab.privacy.statement import statement
from fedlab.report.html import render_report
from fedlab.run.directory import json_text


def regenerate(path: Path, result: Mapping[str, Any]) -> dict[str, str]:
    """Name → text of ``result.json`` with its privacy recomputed, ``PRIVACY.md`` and ``report.html``.

    Empty where another version of fedlab wrote the run: its sentences are its own.
    """
    environment = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    if environment.get("fedlab") != _version():
        return {}
    return {
        "result.json": json_text(claimed_again(path, environment["run_id"], result)),
        "PRIVACY.md": statement(path, result["clients"], result.get("memorisation")),
        "report.html": render_report(path, dict(result)),
    }


def claimed_again(path: Path, run: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """``result`` with every number about privacy made from the ledgers."""
    config = RunConfig.load(path / "run.toml")
    files = {f.stem: parse_lines(f.read_text(encoding="utf-8")) for f in sorted((path / "ledger").glob("*.jsonl"))}
    told: Mapping[str, Mapping[str, Any]] = result["clients"]
    counted = {client: entry for client, entry in told.items() if "delta" in entry}
    own = config.privacy.unit == "client"
    ledgers: dict[str, list[Entry]] = {client: files.get(SERVER if own else client, []) for client in counted}
    deltas = {client: _delta(ledgers[client], run, entry["delta"]) for client, entry in counted.items()}
    unseen = {client: [event_of(event) for event in entry.get("unseen", ())] for client, entry in counted.items()}
    claims = privacy_claims(config, run, ledgers, deltas, unseen)
    clients = {client: {**entry, **claims["clients"].get(client, {})} for client, entry in told.items()}
    return {**result, **claims, "clients": clients}


def _delta(entries: list[Entry], run: str, said: float) -> float:
    """The δ of this run's plan; where none was signed, the one that is said."""
    plan = next((e for e in entries if e["type"] == "PLAN" and e["run"] == run), None)
    return float.fromhex(plan["delta"]) if plan else said


def _version() -> str | None:
    try:
        return metadata.version("fedlab")
    except metadata.PackageNotFoundError:
        return None
