"""A run directory under audit: its files as they lie, what they hold, and what was found wrong so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlab.privacy.audit.chain import read_chain
from fedlab.privacy.audit.claims import RESULT, load_json
from fedlab.privacy.audit.files import TABLE, TEXT, RunFiles, Unreadable
from fedlab.privacy.audit.lines import Finding
from fedlab.privacy.audit.receipts import WHERE, Receipts, read_receipts
from fedlab.privacy.audit.rules import Ledger, read_ledger
from fedlab.privacy.audit.schema import CLIENT, SERVER

FINISHED = ("completed", "budget-exhausted")


@dataclass
class AuditedDirectory:
    """A run directory, with the findings and notes that its audit made so far, in order.

    ``uncovered``: what lies there and is vouched for by nothing; it is named and not believed.
    """

    root: Path
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
    files: RunFiles = field(init=False)

    def __post_init__(self) -> None:
        self.files = RunFiles.below(self.root)
        for name, kind in self.files.odd.items():
            self.find(name, f"is {kind}: a run directory holds directories and regular files only")

    def find(self, where: str, message: str, line: int | None = None) -> None:
        """Add a finding."""
        self.findings.append(Finding(where, line, message))

    def note(self, text: str) -> None:
        """Add something that is no fault but that a reader should know."""
        self.notes.append(text)

    def leave(self, text: str) -> None:
        """Add something that nothing here vouches for."""
        self.uncovered.append(text)

    def read(self, name: str, most: int = TEXT) -> bytes | None:
        """A file's bytes; None, with a finding unless it is just not there."""
        try:
            return self.files.read(name, most)
        except (Unreadable, OSError) as error:
            self.find(name, f"cannot be read: {error}")
            return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A file's JSON object; None, with a finding, for anything else."""
        data = self.read(name, TABLE)
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
    config: Mapping[str, Any]  # run.toml; empty if it cannot be read
    result: Mapping[str, Any]  # result.json; empty if there is none
    environment: Mapping[str, Any]  # environment.json; empty if it cannot be read
    receipts: Receipts | None
    ledgers: Mapping[str, Ledger]  # by file name; the server's own is "server"

    @property
    def status(self) -> str:
        """How the run says that it ended."""
        return str(self.result.get("status", "cut off"))

    @property
    def finished(self) -> bool:
        """Whether the run says that it came to its end."""
        return self.status in FINISHED

    @property
    def run(self) -> str:
        """The run's id: as the server signed it, else as environment.json says; empty if it is not known."""
        found = (self.receipts.run if self.receipts else None) or self.environment.get("run_id")
        return found if isinstance(found, str) else ""

    def payer(self, client: str) -> str:
        """Whose ledger shows what was spent on a client's data: with unit ``client`` the server's."""
        return "server" if self.unit == "client" else client


def read_result(audit: AuditedDirectory) -> Mapping[str, Any]:
    """``result.json``; empty if there is none, which is how a run looks that goes on or was killed."""
    if RESULT not in audit.files and RESULT not in audit.files.folders:
        audit.note(f"{RESULT} is missing: the run goes on, or was cut off")
        return {}
    return audit.read_json(RESULT) or {}


def read_evidence(
    audit: AuditedDirectory,
    unit: str,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    published: Mapping[str, str] | None,
) -> Evidence:
    """Read receipts.jsonl and every ledger, and check whose keys they are signed with.

    Args:
        audit: the directory; it takes the findings.
        unit: ``privacy.unit`` of the run.
        config: what ``run.toml`` says.
        result: what ``result.json`` says.
        published: owner → public key (hex) that was published elsewhere; None if none was.
    """
    elsewhere, finished = published or {}, result.get("status") in FINISHED
    data, receipts = _lines(audit, WHERE, finished), None
    if data is not None:
        receipts = read_receipts(read_chain(data, WHERE, "server", SERVER, "START", elsewhere.get("server")))
        audit.findings += receipts.findings
    named = dict(receipts.clients) if receipts else {}
    if receipts and receipts.start:
        named["server"] = receipts.chain.key or ""
    ledgers = {}
    for name in ledger_names(audit.files):
        if (raw := _lines(audit, f"ledger/{name}.jsonl", finished)) is None:
            continue
        key = elsewhere.get(name) or named.get(name)
        ledgers[name] = read_ledger(read_chain(raw, name, name, CLIENT, "PLAN", key))
        audit.findings += ledgers[name].findings
        if receipts:
            _check_start(audit, name, ledgers[name], receipts, named)
    if published is not None:
        _check_published(audit, unit, published, named, ledgers)
    environment = audit.read_json("environment.json") or {}
    return Evidence(unit, config, result, environment, receipts, ledgers)


def ledger_names(files: RunFiles) -> list[str]:
    """Owners of the ledger files."""
    names = [name.removeprefix("ledger/") for name in files.under("ledger")]
    return [name.removesuffix(".jsonl") for name in names if name.endswith(".jsonl") and "/" not in name]


def _lines(audit: AuditedDirectory, name: str, finished: bool) -> bytes | None:
    """A file of lines. Of a run that was cut off, a line that was cut off too is none, and a file may hold none yet."""
    data = audit.read(name, TABLE)
    if data is None or finished:
        return data
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        audit.note(f"{name}: its last line was cut off with the run, and counts for nothing")
    return whole or None


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
    audit: AuditedDirectory,
    unit: str,
    published: Mapping[str, str],
    named: Mapping[str, str],
    ledgers: Mapping[str, Ledger],
) -> None:
    """The keys published elsewhere are those of this run: of the server and of every client, no fewer and no others.

    With unit ``client`` the server alone signs; what is published of clients is of other runs.
    """
    owners = {"server"} if unit == "client" else published.keys() | {"server"}
    for name in sorted(named.keys() | ledgers.keys() | owners):
        used = {key for key in (named.get(name), ledgers[name].chain.key if name in ledgers else None) if key}
        if name not in published:
            audit.find(name, f"no key was published for this {'client' if name != 'server' else 'run: it signs all'}")
        elif not used:
            audit.find(name, "a key was published for it, but nothing in this run is signed by it: it was left out")
        elif used - {published[name].lower()}:
            audit.find(name, "the key is not the one that was published")
        elif unit == "example" and name != "server" and name not in ledgers:
            audit.find(name, "a key was published for it, but it has no ledger file")
