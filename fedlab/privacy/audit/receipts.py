"""``receipts.jsonl`` and what only it can show: that a ledger's end was cut off, that an older copy was put back, that
keys changed.

``read_receipts`` applies the rules of the file itself; the other functions hold it against the ledgers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedlab.privacy.audit.chain import Chain
from fedlab.privacy.audit.lines import Finding, Line
from fedlab.privacy.audit.rules import Ledger
from fedlab.privacy.audit.schema import ZEROS

WHERE = "receipts.jsonl"


@dataclass(frozen=True)
class Receipts:
    """The server's file, read. ``final`` is the last FINAL; ``closed``: it is the file's last line; ``clients``: whom
    its STARTs name, and their keys.
    """

    chain: Chain
    findings: tuple[Finding, ...]
    start: Line | None
    final: Line | None
    closed: bool
    clients: Mapping[str, str]

    @property
    def current(self) -> bool:
        """Whether it binds what the audit needs bound; the first edition's lines had neither states nor sizes."""
        for line in self.chain.lines:
            whole = {
                "START": "config" in line.body,
                "ROUND": "before" in line.body and isinstance(line["clients"], dict),
            }
            if line.kind == "FINAL":
                whole["FINAL"] = all(isinstance(sealed, list) for sealed in line["files"].values())
            if not whole.get(line.kind, True):
                return False
        return True

    @property
    def run(self) -> str | None:
        return self.start["run"] if self.start else None


def read_receipts(chain: Chain) -> Receipts:
    """Apply the rules of ``receipts.jsonl`` to a verified file; only authentic lines are judged."""
    findings = list(chain.findings)
    lines = [line for line in chain.lines if line.sound]
    starts = [line for line in lines if line.kind == "START"]
    start = starts[0] if starts else next(iter(chain.of("START")), None)

    def report(line: Line, message: str) -> None:
        findings.append(Finding(WHERE, line.number, message))

    if lines and lines[0].seq == 0 and lines[0].kind != "START":
        report(lines[0], f"the first line is {lines[0].kind}, it must be a START")
    heads: dict[tuple[str, int], Line] = {}
    named: dict[str, str] = dict(start["clients"]) if start else {}
    for line in lines:
        if line["dataset"] != ZEROS:
            report(line, "its dataset must be 64 zeros")
        if start is None or not start.sound:
            continue
        if line["run"] != start["run"]:
            report(line, f"{line.kind} is of another run than the START in line {start.number}")
        if line.kind in ("START", "RECEIPT") and line["key"] != chain.key:
            report(line, f"{line.kind} names another key than the one that the file is signed with")
        if line.kind == "START":
            changed = [key for key in ("unit", "config") if line.body.get(key) != start.body.get(key)]
            if any(line["clients"].get(client) != key for client, key in named.items()):  # others may have come later
                changed.insert(0, "clients")
            if changed:
                report(line, f"START has other {changed[0]} than line {start.number}")
            named = {**line["clients"], **named}
        if line.kind == "RECEIPT":
            if line["client"] not in named and (start["unit"] == "example" or line["client"] != "server"):
                report(line, f"RECEIPT for {line['client']!a}, whom START does not name")
            earlier = heads.setdefault((line["client"], line["number"]), line)
            if earlier["head"] != line["head"]:
                report(
                    line,
                    f"RECEIPT names for seq {line['number']} another line than the receipt in line {earlier.number}: a"
                    " forked ledger",
                )
        if (
            line.kind == "ROUND"
            and start["unit"] == "example"
            and (strangers := sorted(set(line["clients"]) - named.keys()))
        ):
            report(line, f"ROUND used {strangers[0]!a}, whom START does not name")
    finals = [line for line in lines if line.kind == "FINAL"]
    final = finals[-1] if finals else None
    ordered = tuple(sorted(findings, key=lambda finding: finding.line or 0))
    return Receipts(chain, ordered, start, final, final is not None and final is chain.lines[-1], named)


def compare(receipts: Receipts, ledgers: Mapping[str, Ledger]) -> Iterator[Finding]:
    """Every RECEIPT and FINAL against the ledgers of this run, and the ledgers' receipts against the server's
    file.
    """
    for line in receipts.chain.lines:
        if line.sound and line.kind == "RECEIPT":
            yield from _receipt(line, ledgers.get(line["client"]))
    yield from _held(receipts, ledgers)
    if receipts.final is not None and receipts.closed:
        yield from _heads(receipts.final, ledgers)


def _last(chain: Chain) -> int:
    """The number of lines that the file should at least have had, judging by what is left of it."""
    return max([chain.size, *(line.seq + 1 for line in chain.lines if line.sound)])


def _cut(chain: Chain, number: int, by: str) -> Finding:
    message = (
        f"ends at line {_last(chain)}, but {by} names line {number + 1}: the end was cut off or an older copy was put"
        " back"
    )
    return Finding(chain.where, None, message)


def _receipt(line: Line, ledger: Ledger | None) -> Iterator[Finding]:
    if ledger is None:
        yield Finding(
            line["client"],
            None,
            f"has no ledger file, but the server holds a receipt for it ({WHERE} line {line.number})",
        )
        return
    chain = ledger.chain
    if chain.swapped:
        return
    found = next((commit for commit, _ in ledger.commits if commit.hash == line["head"]), None)
    charge = next((charge for commit, charge in ledger.commits if commit is found), None)
    if found is None:
        if line["number"] >= _last(chain):
            yield _cut(chain, line["number"], f"a receipt ({WHERE} line {line.number})")
        elif not chain.holes:
            yield Finding(
                chain.where,
                line["number"] + 1,
                f"is not the COMMIT that the receipt in {WHERE} line {line.number} names: another history",
            )
    elif found.sound:
        expected: dict[str, Any] = {"number": found.seq, "out": found["out"], "run": found["run"]}
        if charge is not None and charge.sound:
            expected["round"] = charge["round"]
        if wrong := [key for key, value in expected.items() if line[key] != value]:
            yield Finding(
                WHERE,
                line.number,
                f"RECEIPT has another {wrong[0]} than the COMMIT in {chain.where} line {found.number}",
            )


def _held(receipts: Receipts, ledgers: Mapping[str, Ledger]) -> Iterator[Finding]:
    """What clients were given must be in the server's file, signed with the server's key."""
    known = {line.hash for line in receipts.chain.of("RECEIPT")}
    for ledger in ledgers.values():
        for line in ledger.releases:
            receipt = line["receipt"]
            if not line.sound or line["run"] != receipts.run:
                continue
            if receipt["key"] != receipts.chain.key:
                yield Finding(
                    ledger.chain.where,
                    line.number,
                    "RELEASE holds a receipt that is not signed with this run's server key",
                )
            elif receipt["hash"] in known:
                continue
            elif receipt["seq"] >= _last(receipts.chain):
                where = f"the receipt in {ledger.chain.where} line {line.number}"
                yield _cut(receipts.chain, receipt["seq"], where)
            elif not receipts.chain.holes:
                yield Finding(ledger.chain.where, line.number, f"RELEASE holds a receipt that is not in {WHERE}")


def _heads(final: Line, ledgers: Mapping[str, Ledger]) -> Iterator[Finding]:
    """FINAL names the last line of every ledger."""
    heads: Mapping[str, Any] = final["heads"]
    for name in sorted(heads.keys() - ledgers.keys()):
        yield Finding(
            name, None, f"has no ledger file, but FINAL names its line {heads[name][0] + 1}: the file was removed"
        )
    for name, ledger in ledgers.items():
        chain = ledger.chain
        if name not in heads:
            yield Finding(WHERE, final.number, f"FINAL does not name the ledger of {name!a}")
            continue
        number, head = heads[name]
        if chain.swapped or any(line.hash == head and line is chain.lines[-1] for line in chain.lines):
            continue
        if number >= _last(chain):
            yield _cut(chain, number, f"FINAL ({WHERE} line {final.number})")
        elif any(line.hash == head and line.sound for line in chain.lines):
            yield Finding(
                chain.where, number + 2, f"was added after the run's end: FINAL names line {number + 1} as the last"
            )
        elif not chain.holes:
            yield Finding(
                chain.where,
                number + 1,
                f"is not the line that FINAL ({WHERE} line {final.number}) names as the last: another history",
            )
