"""Adding a strategy touches four places: its file, the list, a row of the conformance test, the tables of the docs."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = '''"""Toy: clients train B, and the server moves on by a share of the change before."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedlab.lora.state import State
from strategies.base import Round, ServerState, Strategy, Updates, Weights
from strategies.options import NoOptions


class ToyOptions(NoOptions):
    """Own keys of ``[strategy]`` with ``name = "toy"``."""

    again: float = Field(default=0.0, ge=0, lt=1, description="share of the change before")


class Toy(Strategy):
    """B_t+1 = B_t + Δ_t + again·Δ_t−1."""

    effective: ClassVar[str] = "mean of products, exactly"
    trains: ClassVar[frozenset[str]] = frozenset({"lora_B"})
    Options: ClassVar[type[ToyOptions]] = ToyOptions
    options: ToyOptions

    def change(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        mean, _ = super().change(state, {}, updates, weights, round)
        again = self.options.again
        moved = {name: value + again * server_state.get(name, 0 * value) for name, value in mean.items()}
        return moved if again else mean, mean
'''
SIMULATE = """
import sys
import fedlab, strategies
from pathlib import Path

import pytest
assert Path(strategies.__file__).is_relative_to(Path.cwd()), strategies.__file__
config = fedlab.RunConfig.load("tiny.toml", ["strategy={name='toy', again=0.5}", "run.rounds=2"])
result = fedlab.simulate(config, "run", quiet=True).result
assert result["status"] == "completed" and result["strategy"] == "toy", result
"""


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path}: {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def python(tree: Path, *arguments: str) -> None:
    own = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_a_strategy_is_added_in_four_places(tmp_path: Path, tiny_toml: str):
    tree = tmp_path / "tree"
    for name in ("fedlab", "strategies", "clients", "tests/strategies"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/conftest.py", "docs/strategies.md", "pyproject.toml"):
        (tree / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tree / name)

    (tree / "strategies/toy.py").write_text(TOY, encoding="utf-8")
    edit(tree / "strategies/__init__.py", "\nAGGREGATORS", "\nfrom strategies.toy import Toy\n\nAGGREGATORS")
    edit(tree / "strategies/__init__.py", '    "head": HeadOnly,\n', '    "head": HeadOnly,\n    "toy": Toy,\n')
    rows = tree / "tests/strategies/conformance_rows.py"
    edit(rows, '    Row("fedex", EXACT),\n', '    Row("fedex", EXACT),\n    Row("toy", EXACT, ranks="changes"),\n')
    edit(rows, '    "energy": ["0.5"],\n', '    "energy": ["0.5"],\n    "again": ["0.5"],\n')
    python(tree, "tests/strategies/test_conformance.py")  # writes the tables of the docs

    assert changed(tree) == [
        "docs/strategies.md",
        "strategies/__init__.py",
        "strategies/toy.py",
        "tests/strategies/conformance_rows.py",
    ]
    tests = [f"tests/strategies/test_{name}.py" for name in ("conformance", "options", "table")]
    python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "toy or every_strategy or docs", *tests)
    (tree / "tiny.toml").write_text(tiny_toml, encoding="utf-8")
    python(tree, "-c", SIMULATE)


def changed(tree: Path) -> list[str]:
    """Files of the copy that are not as in the original."""
    files = [path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()]
    return sorted(
        name for name in files if not (ROOT / name).is_file() or not filecmp.cmp(ROOT / name, tree / name, False)
    )
