"""A run directory under audit: its files as they lie, what they hold, and what was found wrong so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlab.privacy.audit.chain import read_chain
from fedlab.privacy.audit.claims import load_json
from fedlab.privacy.audit.lines import Finding
from fedlab.privacy.audit.receipts import WHERE, Receipts, read_receipts
from fedlab.privacy.audit.rules import Ledger, read_ledger
from fedlab.privacy.audit.schema import CLIENT, SERVER

FINISHED = ("completed", "budget-exhausted")


@dataclass
class AuditedDirectory:
    """A run directory, with the findings and notes that its audit made so far, in order."""

    root: Path
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def find(self, where: str, message: str, line: int | None = None) -> None:
        """Add a finding."""
        self.findings.append(Finding(where, line, message))

    def note(self, text: str) -> None:
        """Add something that is no fault but that a reader should know."""
        self.notes.append(text)

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
        """A file's JSON object; None, with a finding, for anything else."""
        data = self.read(name)
        try:
            value = load_json(data.decode("utf-8")) if data is not None else None
        except ValueError as error:
            self.find(name, f"cannot be read: {error}")
            return None
        if value is None or not isinstance(value, dict):
            self.find(name, "is missing" if data is None else "is no JSON object")
            return None
        return value


@dataclass(frozen=True)
class Evidence:
    """What a run directory holds: what was promised, claimed, signed by the server, and signed by each client."""

    unit: str  # "example" | "client"
    result: Mapping[str, Any]  # result.json; empty if it cannot be read
    receipts: Receipts | None
    ledgers: Mapping[str, Ledger]  # by file name; the server's own is "server"

    @property
    def status(self) -> str:
        """How the run says that it ended."""
        return str(self.result.get("status"))

    @property
    def finished(self) -> bool:
        """Whether the run says that it came to its end."""
        return self.status in FINISHED

    def payer(self, client: str) -> str:
        """Whose ledger shows what was spent on a client's data: with unit ``client`` the server's."""
        return "server" if self.unit == "client" else client


def read_evidence(
    audit: AuditedDirectory,
    unit: str,
    result: Mapping[str, Any],
    files: Mapping[str, Path],
    published: Mapping[str, str] | None,
) -> Evidence:
    """Read receipts.jsonl and every ledger, and check whose keys they are signed with.

    Args:
        audit: the directory; it takes the findings.
        unit: ``privacy.unit`` of the run.
        result: what ``result.json`` says.
        files: owner → ledger file.
        published: owner → public key (hex) that was published elsewhere; None if none was.
    """
    elsewhere = published or {}
    data, receipts = audit.read(WHERE), None
    if data is not None:
        receipts = read_receipts(read_chain(data, WHERE, "server", SERVER, "START", elsewhere.get("server")))
        audit.findings += receipts.findings
    named = dict(receipts.clients) if receipts else {}
    if receipts and receipts.start:
        named["server"] = receipts.chain.key or ""
    ledgers = {}
    for name, file in files.items():
        if (raw := audit.read(file.relative_to(audit.root).as_posix())) is None:
            continue
        key = elsewhere.get(name) or named.get(name)
        ledgers[name] = read_ledger(read_chain(raw, name, name, CLIENT, "PLAN", key))
        audit.findings += ledgers[name].findings
        if receipts:
            _check_start(audit, name, ledgers[name], receipts, named)
    if published is not None:
        _check_published(audit, published, named, ledgers)
    return Evidence(unit, result, receipts, ledgers)


def _check_start(
    audit: AuditedDirectory, name: str, ledger: Ledger, receipts: Receipts, named: Mapping[str, str]
) -> None:
    """A ledger is signed with the key that the run's START names for its owner."""
    if receipts.start is None or ledger.chain.swapped or ledger.chain.key in (None, named.get(name)):
        return
    text = "it is signed with another key than START names for this client"
    if name not in named:
        text = "START names no such client"
    audit.find(name, f"{text} ({WHERE} line {receipts.start.number})")


def _check_published(
    audit: AuditedDirectory, published: Mapping[str, str], named: Mapping[str, str], ledgers: Mapping[str, Ledger]
) -> None:
    """The keys that START names and that ledgers are signed with are those that were published elsewhere."""
    for name in sorted(named.keys() | ledgers.keys()):
        used = {key for key in (named.get(name), ledgers[name].chain.key if name in ledgers else None) if key}
        if name not in published and name != "server":
            audit.find(name, "no key was published for this client")
        elif name in published and used - {published[name].lower()}:
            audit.find(name, "the key is not the one that was published")
