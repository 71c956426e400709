"""The rounds, as the server sealed them: each begins with the state that the one before left, and the last one's is the
run's.

A ROUND names the state before, what was sent of it, the digest of every update that came in, and the state after. What
was sent must be what the clients were charged for, and what came in what they committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedlab.privacy.audit.lines import Finding, Line
from fedlab.privacy.audit.receipts import WHERE, Receipts
from fedlab.privacy.audit.rules import Ledger


def check_rounds(receipts: Receipts, ledgers: Mapping[str, Ledger], finished: bool) -> Iterator[Finding]:
    """Every ROUND against its neighbours and against the ledgers of this run."""
    lines = [line for line in receipts.chain.lines if line.sound]
    rounds = [line for line in lines if line.kind == "ROUND"]
    yield from _states(receipts, lines)
    yield from _charges(receipts, ledgers, rounds)
    receipted = {(line["client"], line["round"], line["out"]) for line in lines if line.kind == "RECEIPT"}
    example = receipts.start is None or receipts.start["unit"] == "example"
    for at, line in enumerate(lines):
        if line.kind != "ROUND":
            continue
        names = line["clients"] if example else dict.fromkeys(["server"] * bool(line["clients"]))
        rest = next((later.kind for later in lines[at + 1 :] if later.kind != "RECEIPT"), None)
        lost = rest == "START" or (rest is None and not finished)  # cut off while receipts were written
        for name, update in names.items():
            yield from _used(receipts, ledgers.get(name), name, line, update)
            if example and not lost and not receipts.chain.holes and (name, line["round"], update) not in receipted:
                text = f"ROUND {line['round']} used an update of {name!a} without a receipt for it"
                yield Finding(WHERE, line.number, text)


def _used(receipts: Receipts, ledger: Ledger | None, name: str, line: Line, update: str | None) -> Iterator[Finding]:
    """An update that was used was committed, by this digest if one is named."""
    what = f"ROUND {line['round']} used an update of {name!a}, who"
    if ledger is None:
        yield Finding(WHERE, line.number, f"{what} has no ledger file")
    elif ledger.chain.holes:
        return
    else:
        where = receipts.run, line["round"], line["in"]
        outs = {end["out"] for end, c in ledger.commits if (c["run"], c["round"], c["in"]) == where}
        if not outs:
            yield Finding(WHERE, line.number, f"{what} has no COMMIT for it")
        elif update is not None and update not in outs:
            yield Finding(WHERE, line.number, f"{what} committed another one")


def _states(receipts: Receipts, lines: Sequence[Line]) -> Iterator[Finding]:
    """Each round goes on from the last one; FINAL has the last one's state, or where that round was lost to a restart
    and could not be repeated, the state before it.
    """
    after: dict[int, str] = {}
    first: str | None = None
    restarted, last = False, None
    for line in lines:
        if line.kind == "START":
            restarted = True
        elif line.kind == "FINAL" and last is not None and line["state"] not in _ends(last, restarted):
            yield Finding(
                WHERE, line.number, f"FINAL has another state than ROUND {last['round']} left (line {last.number})"
            )
        if line.kind != "ROUND":
            continue
        number = line["round"]
        expected = after.get(number - 1) if number > 1 else first
        if expected is None and number > 1:
            if not receipts.chain.holes:
                yield Finding(WHERE, line.number, f"ROUND {number} follows no ROUND {number - 1}")
        elif expected is not None and line["before"] != expected:
            yield Finding(WHERE, line.number, f"ROUND {number} does not begin with the state that was left")
        if number in after and not restarted:
            yield Finding(WHERE, line.number, f"a second ROUND {number}, though nothing was resumed")
        first = line["before"] if number == 1 else first
        after = {r: out for r, out in after.items() if r < number} | {number: line["out"]}
        restarted, last = False, line


def _ends(last: Line, restarted: bool) -> tuple[str, ...]:
    """The states that a run may end with after its last ROUND."""
    return (last["out"], last["before"]) if restarted else (last["out"],)


def _charges(receipts: Receipts, ledgers: Mapping[str, Ledger], rounds: Sequence[Line]) -> Iterator[Finding]:
    """One state per round for all clients, the one that the server says it sent."""
    sent: dict[int, set[str]] = {}
    for line in rounds:
        sent.setdefault(line["round"], set()).add(line["in"])
    resumed = sum(line.sound for line in receipts.chain.of("START")) > 1
    reference: dict[int, tuple[str, Line]] = {}
    for name, ledger in ledgers.items():
        if ledger.chain.swapped:
            continue
        charges = [line for line in ledger.charges if line.sound and line["run"] == receipts.run]
        last = {line["round"]: line for line in charges}
        for line in charges:
            if resumed and last[line["round"]] is not line:
                continue  # an attempt that was lost with the server; the later one counts for the round
            number, state = line["round"], line["in"]
            if number in sent:
                if state not in sent[number]:
                    text = f"CHARGE of round {number} has another state than the one the server sent"
                    yield Finding(ledger.chain.where, line.number, text)
            elif (first := reference.setdefault(number, (name, line)))[1]["in"] != state:
                message = f"CHARGE of round {number} has another state than {first[0]}'s (line {first[1].number})"
                yield Finding(ledger.chain.where, line.number, message)
