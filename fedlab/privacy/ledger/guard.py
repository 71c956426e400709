"""The owner's side of a ledger: what was promised, what may still be spent, and nothing without a line first.

plan → (charge → train → commit → release) per round. A charge is on the disk before the data is touched. A request that
differs from the signed plan, exceeds its participations, or would cross the budget is refused, and the refusal
recorded. One charge has one output: a repeat under the same charge must commit the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedlab.errors import PrivacyError
from fedlab.privacy.accounting import COARSE, FINE, Event, epsilon
from fedlab.privacy.ledger.ledger import Entry, Ledger, authentic, charged, event_of, events
from fedlab.privacy.ledger.spending import merged
from fedlab.privacy.ledger.terms import TERMS
from fedlab.protocol.failures import code_of

MOST_REFUSALS, MOST_REASON = 1000, 300  # lines per run, characters: a server that keeps asking does not fill the disk


class Refusal(PrivacyError):
    """The owner will not do what it was asked; nothing was spent.

    ``kind``: budget-exhausted, participations, plan-mismatch, policy or repeated. ``reason`` says it in words of the
    configuration, of the plan and of the policy.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason, self.code = kind, reason, kind


class NotTheSame(PrivacyError):
    """A repeat under one charge came to other bits; they stay."""

    code = "repeated"


class Guard:
    """One owner's ledger in one run: nothing is spent without a line, and nothing beyond what was signed.

    Args:
        ledger: the owner's file for one data set.
        run: the run's id, 32 hex digits.
        one_answer: refuse a round that was committed before, also where noise is secure and it would be charged anew.
    """

    def __init__(self, ledger: Ledger, run: str, one_answer: bool = False) -> None:
        self.ledger, self.run, self.one_answer = ledger, run, one_answer

    def agree(self, configuration: str, first: bool) -> None:
        """Raise Refusal unless this run's plan was signed for the configuration of this hash.

        ``first``: of a request that may come before a plan is signed.
        """
        with self.ledger.locked():
            plan = self.signed
            if plan is None and not first:
                raise self._refused(0, "plan-mismatch", "this run signed no plan with this client")
            if plan is not None and (signed := plan.get("configuration", "none")) != configuration:
                reason = f"configuration {configuration[:12]}… was asked, {signed[:12]}… was signed"
                raise self._refused(0, "plan-mismatch", reason)

    def refused(self, round_number: int, kind: str, reason: str) -> Refusal:
        """A refusal, to be raised; it is in the ledger when this returns, unless there is no ledger yet."""
        with self.ledger.locked():
            return self._refused(round_number, kind, reason)

    def committed(self, round_number: int, received: str | None = None) -> Entry | None:
        """The last commit of a round (on this state, if one is given); None without one. Needs the ledger's lock."""
        charges = {
            e["hash"]
            for e in self.ledger.entries
            if e["type"] == "CHARGE"
            and (e["run"], e["round"]) == (self.run, round_number)
            and received in (None, e["in"])
        }
        return next(
            (e for e in reversed(self.ledger.entries) if e["type"] == "COMMIT" and e["charge"] in charges), None
        )

    def plan(self, terms: Mapping[str, Any], code: Mapping[str, str]) -> Refusal | None:
        """Sign the plan of this run, or find the signed one.

        Args:
            terms: what the plan says, with the keys ``TERMS``.
            code: name → version of the code that will run.

        Returns:
            The refusal if not even one round is affordable, else None.

        Raises:
            Refusal: "plan-mismatch": this run's plan was signed with other terms.
        """
        with self.ledger.locked():
            if self.signed is None:
                self.ledger.append("PLAN", self.run, key=self.ledger.public, code=dict(code), **terms)
            plan = self._agreed(terms, 0)
            if charged(self.ledger.entries, self.run):
                return None  # resumed: what was afforded once may be repeated, the rest is refused in its round
            try:
                self._admit(plan, 0, None)
            except Refusal as refusal:
                return refusal
        return None

    @contextmanager
    def charge(
        self, terms: Mapping[str, Any], round_number: int, received: str
    ) -> Iterator[Callable[[int, str], None]]:
        """Charge one round and hold the data set's lock while it is trained.

        Formal guarantee: the CHARGE line is on the disk before the block begins. Leaving without a commit, in whatever
        way, leaves the charge counted in full.

        Args:
            terms: what is asked; it must be what was signed.
            round_number: from 1.
            received: digest of the state that the round starts from.

        Yields:
            ``commit(steps, out)``: the steps that were executed, and the digest of the update.

        Raises:
            Refusal: before anything is charged.
            PrivacyError: a commit of other steps than were charged.
        """
        with self.ledger.locked():
            plan = self._agreed(terms, round_number)
            if self.one_answer and self.committed(round_number) is not None:
                raise self._refused(round_number, "repeated", "this round was committed before")
            admitted = self._admit(plan, round_number, received)
            same = self.committed(round_number, received) if self._repeats(plan, round_number, received) else None
            fields = {"plan": plan["hash"], "event": plan["event"], "in": received, "filter": admitted}
            charge = self.ledger.append("CHARGE", self.run, round=round_number, **fields)
            done = False

            def commit(steps: int, out: str) -> None:
                nonlocal done
                self._check_output(steps, plan["event"]["steps"], out, same)
                self.ledger.append("COMMIT", self.run, charge=charge["hash"], steps=steps, out=out)
                done = True

            try:
                yield commit
            except BaseException as error:
                if not done and not self._has_commit(charge):
                    self.ledger.append("ABORT", self.run, charge=charge["hash"], reason=code_of(error))
                raise

    def _check_output(self, steps: int, charged_steps: int, out: str, same: Entry | None) -> None:
        """Raise PrivacyError unless an output is what was charged: its steps, and the bits of ``same``, an earlier
        output under the same charge.
        """
        if steps != charged_steps:
            raise PrivacyError(f"{steps} steps were executed, {charged_steps} were charged; the update is not released")
        if same is not None and same["out"] != out:
            raise NotTheSame("a repeat came to other bits than before under one charge; the update is not released")

    def exhausted(self, terms: Mapping[str, Any], round_number: int) -> bool:
        """Whether the budget cannot cover a further round; if so, the refusal is recorded before anybody has to ask.

        Args:
            terms: what was signed.
            round_number: the next round's.
        """
        if terms["budget"] is None:
            return False
        with self.ledger.locked():
            try:
                self._admit(self._agreed(terms, round_number), round_number, None)
            except Refusal:
                return True
        return False

    def release(self, receipt: Entry) -> None:
        """Keep the server's countersignature of a commit, once.

        Args:
            receipt: the server's RECEIPT line.

        Raises:
            PrivacyError: nothing of the kind was committed here, or the signature is not by the key that it names.
        """
        with self.ledger.locked():
            wanted = receipt.get("number"), receipt.get("head")
            found = [e for e in self.ledger.entries if e["type"] == "COMMIT" and (e["seq"], e["hash"]) == wanted]
            if not found or receipt.get("client") != self.ledger.owner or receipt.get("out") != found[0]["out"]:
                raise PrivacyError(
                    f"{self.ledger.owner}: the server's receipt names line {wanted[0]}, which is no commit of this"
                    " ledger"
                )
            if not authentic(receipt, str(receipt.get("key"))):
                raise PrivacyError(
                    f"{self.ledger.owner}: the server's receipt of line {wanted[0]} is not signed by the key it names"
                )
            known = {e["commit"] for e in self.ledger.entries if e["type"] == "RELEASE"}
            if receipt["head"] not in known:  # a duplicated message
                self.ledger.append("RELEASE", self.run, durable=False, commit=receipt["head"], receipt=receipt)

    def close(self) -> None:
        """Say, signed, that this run is over for this owner, and how much it was charged.

        Whoever cuts the ledger's end off, the server included, has no such line to put there. Does nothing where no
        plan was signed, or where it was said already and nothing was charged since.
        """
        with self.ledger.locked():
            plan = self.signed
            mine = [e for e in self.ledger.entries if e["run"] == self.run and e["type"] in ("CHARGE", "CLOSE")]
            if plan is None or (mine and mine[-1]["type"] == "CLOSE"):
                return
            count = len(charged(self.ledger.entries, self.run))
            self.ledger.append("CLOSE", self.run, plan=plan["hash"], charges=count)

    def _has_commit(self, charge: Entry) -> bool:
        """Whether the charge has its COMMIT in the file, also if an interrupt came between writing and knowing it."""
        with_all = self.ledger.refreshed()
        return any(e["type"] == "COMMIT" and e["charge"] == charge["hash"] for e in with_all)

    @property
    def signed(self) -> Entry | None:
        """This run's plan; None if there is none. Needs the ledger's lock."""
        return next((e for e in self.ledger.entries if e["type"] == "PLAN" and e["run"] == self.run), None)

    def _agreed(self, terms: Mapping[str, Any], round_number: int) -> Entry:
        """The signed plan, if it says what is asked."""
        plan = self.signed
        if plan is None:
            raise self._refused(round_number, "plan-mismatch", "this run signed no plan with this client")
        for name in TERMS:
            if (signed := plan.get(name)) != terms[name]:
                reason = f"{name} = {_shown(terms[name])} was asked, {_shown(signed)} was signed"
                raise self._refused(round_number, "plan-mismatch", reason)
        return plan

    def _admit(self, plan: Entry, round_number: int, received: str | None) -> str:
        """The accountant under which one more round is allowed ("none" without a budget). Raises Refusal."""
        entries = self.ledger.entries
        mine = charged(entries, self.run)
        repeated = self._repeats(plan, round_number, received)
        if not repeated and received is not None and len(mine) >= plan["participations"]:
            raise self._refused(
                round_number, "participations", f"{len(mine)} of {plan['participations']} rounds are used"
            )
        if plan["budget"] is None:
            return "none"
        limit, delta = (float.fromhex(plan["budget"][k]) for k in ("epsilon", "delta"))
        spent = events(entries)
        admitted, would = affordable(spent if repeated else [*spent, event_of(plan["event"])], limit, delta)
        if admitted is None:
            before = epsilon(spent, delta)
            more = f"one more round of {_shown(plan['event'])} would make it {would:.4f}"
            reason = f"ε = {before:.4f} of {limit:g} is spent at δ = {delta:.2g}; {more}"
            raise self._refused(round_number, "budget-exhausted", reason)
        return admitted

    def _repeats(self, plan: Entry, round_number: int, received: str | None) -> bool:
        """Whether a charge would repeat an earlier one, and count once with it: only where noise is seeded."""
        entries = self.ledger.entries
        asked = {"type": "CHARGE", "run": self.run, "round": round_number, "plan": plan["hash"], "in": received}
        return len(charged([*entries, asked])) == len(charged(entries))

    def _refused(self, round_number: int, kind: str, reason: str) -> Refusal:
        last = self.ledger.entries[-1] if self.ledger.entries else None
        again = (
            last is not None
            and last["type"] == "REFUSE"
            and (last["run"], last["round"], last["kind"]) == (self.run, round_number, kind)
        )
        if last is not None and not again and self._refusals() < MOST_REFUSALS:
            self.ledger.append("REFUSE", self.run, round=round_number, kind=kind, reason=reason[:MOST_REASON])
        return Refusal(kind, reason)

    def _refusals(self) -> int:
        return sum(e["type"] == "REFUSE" and e["run"] == self.run for e in self.ledger.entries)


def affordable(spent: Iterable[Event], limit: float, delta: float) -> tuple[str | None, float]:
    """Whether ε of all events is at most ``limit`` at ``delta``.

    RDP is a valid filter also when later events were chosen after looking at earlier outputs (Feldman and Zrnic, arXiv
    2008.11193). PLD is tighter and needs a schedule that nobody adapts; many steps of one mechanism, stopped at a
    number that only the budget decides, are one.

    Returns:
        The accountant that says so (None if none does), and the ε that it found.
    """
    work = list(spent)
    if (found := epsilon(work, delta, "rdp")) <= limit:
        return "rdp", found
    if len({(e.sampler, e.q, e.sigma) for e in work}) == 1:
        for interval in (COARSE, FINE):  # both are upper bounds; the fine one is a little tighter, ten times as slow
            if (found := epsilon(work, delta, "pld", interval=interval)) <= limit:
                return "pld", found
    return None, found


def spent_of_budget(spent: Sequence[Event], delta: float) -> float:
    """ε that ``affordable`` holds against a budget, for display: by PLD where it may be used, else by RDP."""
    alike = len({(e.sampler, e.q, e.sigma) for e in spent}) <= 1
    return epsilon(merged(spent), delta, "pld" if alike else "rdp", interval=COARSE)


def _shown(value: Any) -> str:
    """Hexadecimal reals in figures that people read."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_shown(v)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, str) and "0x" in value:
        return f"{float.fromhex(value):.6g}"
    return str(value)[:40]
