"""A client's account in one run: its ledger, the plan that it signed, and the releases that it charged for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from clients.owner import Owner
from fedlab.data.sources import identity
from fedlab.lora.state import part_of
from fedlab.privacy.ledger.guard import Guard, Refusal
from fedlab.privacy.ledger.keys import keyed_hash, load_or_create_key
from fedlab.privacy.ledger.ledger import Ledger, lines_after
from fedlab.privacy.ledger.terms import budget_terms, scope_of
from fedlab.session import Session

PACKAGES = ("fedlab", "torch", "dp-accounting", "opacus", "cryptography")


class ClientAccount:
    """One client's guard and the terms under which it takes part in this run."""

    def __init__(self, session: Session, owner: Owner, run: str, parts: Sequence[str]) -> None:
        """``parts`` (``lora_A``, ``lora_B``, ``head``): the most that it is ever asked to train, which its clip covers.

        Raises PrivacyError for a ledger that cannot be read.
        """
        plan = session.plan(owner.client)
        assert plan is not None
        self.plan, self.client = plan, owner.client
        self.guard = Guard(_ledger(owner.places.ledgers, owner.client, identity(session.config.data), run), run)
        shapes = {name: shape for name, shape in session.shapes.items() if part_of(name) in parts}
        budget = owner.budget
        self.terms: Mapping[str, Any] = {
            **plan.terms(),
            "scope": scope_of(shapes),
            "budget": budget_terms(budget.epsilon, budget.delta or plan.delta) if budget else None,
            "content": keyed_hash(self.guard.ledger.key, "content", session.data.fingerprint(owner.client)),
        }
        self.names = sorted(shapes)

    def sign(self) -> Refusal | None:
        """Sign the plan of this run, or find the signed one; the refusal if not even one round is affordable."""
        return self.guard.plan(self.terms, code_versions())

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
            raise Refusal(
                "plan-mismatch", f"{unsigned[0]} was asked to be trained, which the signed scope does not cover"
            )


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


@lru_cache(maxsize=4096)
def _ledger(directory: Path, client: str, source: str, run: str) -> Ledger:
    """One object per file, run and process: it verifies only what it has not seen yet."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = load_or_create_key(directory / "keys" / f"{client}.pem")
    return Ledger(directory / f"{client}.jsonl", client, keyed_hash(key, "dataset", source), key)
