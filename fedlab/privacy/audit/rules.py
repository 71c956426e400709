"""What the lines of a client's file say together: who was planned, charged, committed, released, and what counts.

Checked on authentic lines only, and only against authentic lines: damage is named in ``chain.py``, once. Counting errs
upward: a line whose hash or signature is wrong still counts as a charge if it reads as one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fedlab.privacy.accounting import Event
from fedlab.privacy.audit.chain import Chain
from fedlab.privacy.audit.lines import Finding, Line, digest, signed
from fedlab.privacy.audit.schema import number


@dataclass(frozen=True)
class Ledger:
    """A client's file, read.

    ``counted``: the charges that count, in the order of the file; ``commits``: with their charges.
    """

    chain: Chain
    findings: tuple[Finding, ...]
    plans: tuple[Line, ...]
    charges: tuple[Line, ...]
    counted: tuple[Line, ...]
    commits: tuple[tuple[Line, Line], ...]
    releases: tuple[Line, ...]
    refusals: tuple[Line, ...]
    closes: tuple[Line, ...]

    def closed(self, run: str) -> bool:
        """Whether the owner said that the run is over, and was not charged in it since."""
        last = max((line.seq for line in self.charges if line["run"] == run), default=-1)
        return any(line.sound and line["run"] == run and line.seq > last for line in self.closes)

    def charges_of(self, run: str) -> int:
        """Counted charges of one run."""
        return sum(line["run"] == run for line in self.counted)

    @property
    def bounded(self) -> bool:
        """False if some line could not be interpreted: then nothing is known about what was spent."""
        return self.chain.unreadable == 0

    def events(self, until: Line | None = None) -> list[Event]:
        """The counted charges, up to a line if one is given."""
        return [event_of(line) for line in self.counted if until is None or line.seq <= until.seq]

    def plan(self, run: str) -> Line | None:
        return next((line for line in self.plans if line["run"] == run), None)


def real(text: str) -> float:
    """The double behind a checked hexadecimal string."""
    value = number(text)
    assert value is not None, text
    return value


def event_of(line: Line) -> Event:
    """The event of a PLAN or CHARGE."""
    event = line["event"]
    return Event(event["sampler"], real(event["q"]), real(event["sigma"]), event["steps"])


@dataclass
class _State:
    chain: Chain
    findings: list[Finding] = field(default_factory=list)
    plans: dict[str, Line] = field(default_factory=dict)  # by run
    by_hash: dict[str, Line] = field(default_factory=dict)
    ended: dict[str, Line] = field(default_factory=dict)  # hash of a CHARGE → what ended it
    open: Line | None = None
    counted: list[Line] = field(default_factory=list)
    per_run: Counter[str] = field(default_factory=Counter)
    repeats: dict[tuple[str, int, str, str], str | None] = field(
        default_factory=dict
    )  # seeded charge → the `out` of its COMMIT
    commits: list[tuple[Line, Line]] = field(default_factory=list)
    released: dict[str, Line] = field(default_factory=dict)

    def report(self, line: Line, message: str) -> None:
        if line.sound:
            self.findings.append(Finding(self.chain.where, line.number, message))

    def target(self, line: Line, key: str, *kinds: str) -> Line | None:
        """The earlier line that ``line[key]`` names; a finding if there is none and none can have been lost."""
        found = self.by_hash.get(line[key])
        if found is None or found.kind not in kinds:
            if found is not None or not self.chain.holes:
                self.report(line, f"{line.kind} names as its {key} no {' or '.join(kinds)} before it in this file")
            return None
        if found.sound and found["run"] != line["run"]:
            self.report(line, f"{line.kind} is of another run than its {key} (line {found.number})")
        return found


def read_ledger(chain: Chain) -> Ledger:
    """Apply the rules to a verified file. Never raises for a chain that ``read_chain`` returned."""
    state = _State(chain)
    if chain.key and chain.lines and chain.lines[0].seq == 0 and chain.lines[0].kind != "PLAN":
        state.report(chain.lines[0], f"the first line is {chain.lines[0].kind}, it must be a PLAN")
    handlers = {"PLAN": _plan, "CHARGE": _charge, "COMMIT": _commit, "ABORT": _abort, "RELEASE": _release}
    handlers["CLOSE"] = _close
    for line in chain.lines:
        if line.kind in handlers:
            handlers[line.kind](state, line)
        state.by_hash.setdefault(line.hash, line)
    return Ledger(
        chain, (*chain.findings, *sorted(state.findings, key=lambda f: f.line or 0)), tuple(chain.of("PLAN")),
        tuple(chain.of("CHARGE")),
        tuple(state.counted), tuple(state.commits), tuple(chain.of("RELEASE")), tuple(chain.of("REFUSE")),
        tuple(chain.of("CLOSE")),
    )  # fmt: skip


def _plan(state: _State, line: Line) -> None:
    earlier = state.plans.setdefault(line["run"], line)
    if earlier is not line and earlier.sound:
        state.report(line, f"a second PLAN for one run; the first is line {earlier.number}")
    if line["key"] != state.chain.key:
        state.report(line, "PLAN names another key than the one that the file is signed with")


def _charge(state: _State, line: Line) -> None:
    plan = state.target(line, "plan", "PLAN")
    if plan is not None and plan.sound:
        if line["event"] != plan["event"]:
            state.report(line, f"CHARGE has another event than its plan (line {plan.number})")
        if (line["filter"] == "none") != (plan["budget"] is None):
            state.report(
                line,
                f"CHARGE was admitted under {line['filter']!r}, but its plan has"
                f" {'no' if plan['budget'] is None else 'a'} budget",
            )
    if state.open is not None:
        state.ended.setdefault(state.open.hash, line)
    state.open = line
    repeat = (line["run"], line["round"], line["plan"], line["in"])
    if line.sound and plan is not None and plan.sound and plan["noise"] == "seeded":
        if repeat in state.repeats:
            return  # the same bits again
        state.repeats[repeat] = None
    state.counted.append(line)
    state.per_run[line["run"]] += 1
    if plan is not None and plan.sound and state.per_run[line["run"]] == plan["participations"] + 1:
        state.report(line, f"CHARGE exceeds the {plan['participations']} participations that the plan allows")


def _end(state: _State, line: Line) -> Line | None:
    """A COMMIT or ABORT ends the CHARGE that it names, which must be the open one."""
    charge = state.target(line, "charge", "CHARGE")
    if charge is None:
        return None
    if (ender := state.ended.setdefault(charge.hash, line)) is not line and ender.sound and charge.sound:
        state.report(
            line,
            f"{line.kind} names the CHARGE in line {charge.number}, which line {ender.number} ({ender.kind}) has ended",
        )
    return charge


def _commit(state: _State, line: Line) -> None:
    charge = _end(state, line)
    if charge is None:
        return
    state.commits.append((line, charge))
    if not charge.sound:
        return
    if line["steps"] != charge["event"]["steps"]:
        state.report(
            line,
            f"COMMIT executed {line['steps']} steps, {charge['event']['steps']} were charged (line {charge.number})",
        )
    repeat = (charge["run"], charge["round"], charge["plan"], charge["in"])
    if repeat in state.repeats and line.sound:
        before = state.repeats[repeat]
        if before is not None and before != line["out"]:
            state.report(
                line,
                "COMMIT differs in its `out` from an earlier one of the same seeded round: not the same bits, both were"
                " spent",
            )
            state.counted.append(charge)
        else:
            state.repeats[repeat] = line["out"]


def _abort(state: _State, line: Line) -> None:
    _end(state, line)


def _close(state: _State, line: Line) -> None:
    state.target(line, "plan", "PLAN")
    if line["charges"] != state.per_run[line["run"]] and not state.chain.holes:
        state.report(line, f"CLOSE says {line['charges']} charges, the file shows {state.per_run[line['run']]}")


def _release(state: _State, line: Line) -> None:
    receipt = line["receipt"]
    if digest(receipt) != receipt["hash"]:
        state.report(line, "RELEASE holds a receipt that was edited: its hash is not that of its content")
    elif not signed(receipt, receipt["key"]):
        state.report(line, "RELEASE holds a receipt with a bad signature")
    elif receipt["owner"] != "server":
        state.report(line, f"RELEASE holds a receipt of {receipt['owner']!a}, not of the server")
    commit = state.target(line, "commit", "COMMIT")
    if commit is None:
        return
    if (earlier := state.released.setdefault(commit.hash, line)) is not line and earlier.sound:
        state.report(
            line, f"RELEASE of the COMMIT in line {commit.number}, which line {earlier.number} has released already"
        )
    if not commit.sound:
        return
    charge = next((charge for end, charge in state.commits if end is commit and charge.sound), None)
    expected = {
        "client": state.chain.owner,
        "number": commit.seq,
        "head": commit.hash,
        "out": commit["out"],
        "run": commit["run"],
    }
    if charge is not None:
        expected["round"] = charge["round"]
    if wrong := [key for key, value in expected.items() if receipt[key] != value]:
        state.report(
            line,
            f"RELEASE holds a receipt for something else: its {wrong[0]} is not that of the COMMIT in line"
            f" {commit.number}",
        )
