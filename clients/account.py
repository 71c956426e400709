"""A client's account in one run: its ledger, the plan that it signed, and the releases that it charged for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from clients.kept import Kept, keep, kept_path, load
from clients.owner import Owner
from fedlab.privacy.ledger.guard import Guard, Refusal
from fedlab.privacy.ledger.keys import keyed_hash
from fedlab.privacy.ledger.ledger import lines_after
from fedlab.privacy.ledger.terms import budget_terms, run_terms, scope_of
from fedlab.privacy.release import public_names
from fedlab.privacy.scores_plan import beside_rounds
from fedlab.protocol.fields import RunReference
from fedlab.protocol.messages import Release
from fedlab.session import Session

PACKAGES = ("fedlab", "torch", "dp-accounting", "opacus", "cryptography")


class ClientAccount:
    """One client's guard and the terms under which it takes part in this run."""

    def __init__(self, session: Session, owner: Owner, run: RunReference) -> None:
        """Its scope is ``run.parts``: the most that it is ever asked to train, which its clip covers.

        Raises PrivacyError for a ledger that cannot be read.
        """
        plan = session.plan(owner.client)
        assert plan is not None
        self.plan, self.client, self._owner = plan, owner.client, owner
        self._beside, self._drawn = beside_rounds(session.config), session.config.clients_per_round
        self.guard = owner.guard(run.run)
        shapes = session.scope(run.parts)
        self.dimension = sum(math.prod(shape) for shape in shapes.values())  # coordinates of the signed scope
        budget = owner.budget
        self.terms: Mapping[str, Any] = {
            **plan.terms(),
            **run_terms(run.configuration, public_names(session.config)),
            "scope": scope_of(shapes),
            "shared": plan.shared_terms(self.dimension),
            "budget": budget_terms(budget.epsilon, budget.delta or plan.delta) if budget else None,
            "content": keyed_hash(self.guard.ledger.key, "content", session.data.fingerprint(owner.client)),
        }
        self.names = sorted(shapes)

    def sign(self) -> Refusal | None:
        """Sign the plan of this run, or find the signed one; the refusal if not even one round is affordable.

        Raises Refusal for a plan that the owner's policy does not allow, or other terms than were signed; ConfigError
        for shares of noise that do not add up.
        """
        if (shared := self.plan.shared) is not None:
            shared.check_distance(self.plan.sigma, self.dimension, self._drawn)
            shared.check_overflow([self.plan.n], self.plan.sigma, self.dimension)
        problem = self._owner.policy.problem_of_plan(self.plan, self._beside)
        if problem is not None:
            raise self.guard.refused(0, "policy", problem)
        by = {} if self.plan.shared is None else {"accountant": "dp-accounting RDP at integer orders,"}
        return self.guard.plan(self.terms, code_versions() | by)

    def beside(self, run: str) -> Guard:
        """The same ledger for a release beside the rounds, which is a run of its own in it."""
        return Guard(self.guard.ledger, run, self.guard.one_answer)

    def lines_after(self, known: int) -> str:
        """The ledger's lines from number ``known`` on, as they stand in the file."""
        with self.guard.ledger.locked():
            return lines_after(self.guard.ledger.entries, known)

    def exhausted(self, round_number: int) -> bool:
        """Whether the budget cannot cover one more round; if so the ledger says it."""
        return self.guard.exhausted(self.terms, round_number)

    def check_scope(self, trained: Sequence[str]) -> None:
        """Raises Refusal if the server wants something trained that the signed scope does not cover."""
        if unsigned := sorted(set(trained) - set(self.names)):
            raise self.guard.refused(
                0, "plan-mismatch", f"{unsigned[0][:80]} was asked to be trained, which the signed scope does not cover"
            )

    def repeated(self, guard: Guard, round_number: int, asked: str) -> tuple[Release, ...] | None:
        """What was released in a round that was committed before; None if none was, or it may be done again.

        Args:
            guard: of the run, or of its release at a task's end.
            round_number: of the round.
            asked: digest of all that decides the answer.

        Raises:
            Refusal: another request than then, or the answer was not kept.
        """
        if not guard.one_answer:
            return None
        with guard.ledger.locked():
            if guard.committed(round_number) is None:
                return None
        kept = load(self._path(guard))
        if kept is None or (kept.round, kept.asked) != (round_number, asked):
            raise guard.refused(round_number, "repeated", "this round was committed before, for another request")
        return kept.releases

    def keep(self, guard: Guard, round_number: int, asked: str, releases: tuple[Release, ...]) -> None:
        """Keep an answer before it is committed, if a repeat is to get the same."""
        if guard.one_answer:
            keep(self._path(guard), Kept(round_number, asked, releases))

    def _path(self, guard: Guard) -> Path:
        return kept_path(self._owner.places.ledgers, self.client, guard.run)


def release_run(run: str, name: str) -> str:
    """A release beside the rounds in a ledger: a run of its own, of one round, named after the run it belongs to."""
    return hashlib.sha256(f"{run}|{name}".encode()).hexdigest()[:32]


def digest_of(*parts: object) -> str:
    """SHA-256 of plain values: what a repeat of a request is known by."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def code_versions() -> dict[str, str]:
    """Versions of what trains and accounts."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions | {"accountant": "dp-accounting PLD"}
