"""An owner on a machine of its own: what its file says of its budget, and at which δ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clients.owner import Owner, own_owner
from fedlab.config.client import ClientFile
from fedlab.errors import ConfigError
from fedlab.session import open_session

FILE = """
[client]
id = "north"
[data]
path = "notes.csv"
text = "t"
label = "l"
[models.m]
path = "model"
[models."hub/m"]
[policy]
min_sigma = 0.5
max_delta = 1e-7
"""


@pytest.fixture
def owner_of(tmp_path: Path) -> Any:
    """The owner of a file with this budget."""

    def make(budget: str) -> Owner:
        file = ClientFile.parse(f"{FILE}[budget]\n{budget}", tmp_path)
        return own_owner(file, "a" * 32, open_session).one("north")

    return make


def test_a_budget_without_a_delta_is_counted_at_the_policys_whatever_the_server_says(owner_of: Any):
    budget = owner_of("epsilon = 2.0").budget
    assert (budget.epsilon, budget.delta) == (2.0, 1e-7)


def test_a_budgets_own_delta_is_kept(owner_of: Any):
    budget = owner_of("epsilon = 2.0\ndelta = 1e-6").budget
    assert (budget.epsilon, budget.delta) == (2.0, 1e-6)


def test_without_a_budget_nobody_takes_part_under_dp(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"\[budget\] is missing: without one, runs could follow runs for ever"):
        ClientFile.parse(FILE, tmp_path)
    without = FILE.replace("min_sigma = 0.5", 'unit = "none"\nreleases = ["size", "timing", "failure", "update"]')
    assert ClientFile.parse(without, tmp_path).budget is None


def test_paths_are_relative_to_the_file_wherever_it_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    (place / "model").mkdir(parents=True)
    elsewhere.mkdir()
    (place / "client.toml").write_text(f"{FILE}[budget]\nepsilon = 2.0")
    monkeypatch.chdir(elsewhere)
    for name in ("../site/client.toml", str(place / "client.toml")):
        file = ClientFile.load(name)
        assert Path(file.data.path).resolve() == place / "notes.csv"
        assert Path(file.models["m"].path).resolve() == place / "model"
        assert file.models["hub/m"].path is None
        assert file.home.resolve() == place / "north"
        assert file.socket.resolve() == place / "north" / "trainer.sock"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('path = "model"', 'sha256 = "x"', "models.m.sha256"),
        ('[models.m]\npath = "model"\n[models."hub/m"]\n', "", "models is missing"),
        ("text =", "txt =", "did you mean data.text"),
        ("min_sigma = 0.5", "", "needs a limit"),
    ],
)
def test_a_file_that_says_too_little_or_something_else_is_refused(old: str, new: str, said: str, tmp_path: Path):
    assert old in FILE
    with pytest.raises(ConfigError, match=said):
        ClientFile.parse(FILE.replace(old, new) + "[budget]\nepsilon = 2.0", tmp_path)
