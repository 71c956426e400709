"""An owner on a machine of its own: what its node's configuration says of its budget, and at which δ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clients.owner import Owner, own_owner
from fedlab.errors import ConfigError

POLICY = """
min_sigma = 0.5
max_delta = 1e-7
models = ["m"]
[data]
source = "docstrings"
"""


@pytest.fixture
def owner_of(tmp_path: Path) -> Any:
    """The owner of a node with these further keys."""
    (tmp_path / "policy.toml").write_text(POLICY)

    def make(**node: object) -> Owner:
        places = {key: str(tmp_path / key) for key in ("ledger", "personal", "bases")}
        found = own_owner({"client": "north", "policy": str(tmp_path / "policy.toml"), **places, **node}, "a" * 32)
        return found.one("north")

    return make


def test_a_budget_without_a_delta_is_counted_at_the_policys_whatever_the_server_says(owner_of: Any):
    budget = owner_of(**{"budget-epsilon": 2.0}).budget
    assert (budget.epsilon, budget.delta) == (2.0, 1e-7)


def test_a_budgets_own_delta_is_kept(owner_of: Any):
    budget = owner_of(**{"budget-epsilon": "2.0", "budget-delta": "1e-6"}).budget
    assert (budget.epsilon, budget.delta) == (2.0, 1e-6)


def test_without_a_budget_there_is_none_and_the_policy_knows(owner_of: Any):
    owner = owner_of()
    assert owner.budget is None
    assert owner.policy.budgeted is False
    assert owner_of(**{"budget-epsilon": 2.0}).policy.budgeted is True


def test_a_node_that_names_no_client_has_no_owner():
    with pytest.raises(ConfigError, match="names no client"):
        own_owner({}, "a" * 32)
