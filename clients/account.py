"""What a client keeps to itself: its ledger, its key, and the plan that it signed, found where its owner keeps them.

In a simulation the server says where the ledgers lie; a node that belongs to one client looks in its own configuration
(``ledger``, ``budget-epsilon``, ``budget-delta``) and nowhere else.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from flwr.app import ConfigRecord, Context

from fedlab.config.sections import Budget
from fedlab.data.sources import identity
from fedlab.errors import PrivacyError
from fedlab.lora.state import part_of
from fedlab.privacy.ledger.guard import Guard, Refusal, budget_terms, scope_of
from fedlab.privacy.ledger.keys import keyed_hash, load_or_create_key
from fedlab.privacy.ledger.ledger import Ledger, lines_after
from fedlab.session import Session

PACKAGES = ("fedlab", "torch", "dp-accounting", "opacus", "cryptography")


class ClientAccount:
    """One client's guard and the terms under which it takes part in this run."""

    def __init__(self, session: Session, client: str, order: ConfigRecord, context: Context) -> None:
        plan = session.plan(client)
        assert plan is not None
        self.plan, self.client = plan, client
        own = "client" in context.node_config
        home = Path.home() / ".fedlab" / "ledger"
        directory = Path(str(context.node_config.get("ledger", home) if own else order["ledger"]))
        if own:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        elif not directory.is_dir():
            raise PrivacyError(
                f"the ledgers' directory {str(directory)!r} is not on this machine; put it on a file system that all"
                " nodes share"
            )
        run = str(order["run"])
        self.guard = Guard(_ledger(directory, client, identity(session.config.data), run), run)
        budget = _own_budget(context) if own else session.config.privacy.budget
        parts = cast(list[str], order["parts"])
        shapes = {name: shape for name, shape in session.shapes.items() if part_of(name) in parts}
        self.terms: dict[str, Any] = {
            **plan.terms(),
            "scope": scope_of(shapes),
            "budget": budget_terms(budget.epsilon, budget.delta or plan.delta) if budget else None,
            "content": keyed_hash(self.guard.ledger.key, "content", session.data.fingerprint(client)),
        }
        self.names = sorted(shapes)

    def lines_after(self, known: int) -> str:
        """The ledger's lines from number ``known`` on, as they stand in the file."""
        with self.guard.ledger.locked():
            return lines_after(self.guard.ledger.entries, known)

    def exhausted(self, round_number: int) -> bool:
        """Whether the budget cannot cover one more round; if so the ledger says it."""
        return self.guard.exhausted(self.terms, round_number)

    def check_scope(self, trained: list[str]) -> None:
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
    key = load_or_create_key(directory / "keys" / f"{client}.pem")
    return Ledger(directory / f"{client}.jsonl", client, keyed_hash(key, "dataset", source), key)


def _own_budget(context: Context) -> Budget | None:
    limit, delta = context.node_config.get("budget-epsilon"), context.node_config.get("budget-delta")
    return Budget(epsilon=float(limit), delta=None if delta is None else float(delta)) if limit is not None else None
