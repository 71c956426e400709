"""How many places one has to touch to add something: a toy one is added to a copy by exactly those, and works there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "tests" / "objectives" / "toy"
Edit = tuple[str, str, str]  # file, the text before which something is put, and that


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages, the docs and the tests of objectives, to be changed."""
    for name in ("fedlab", "strategies", "clients", "docs", "tests/objectives"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def add(copy: Path, files: dict[str, Path], edits: list[Edit]) -> int:
    """Add new files and put lines into others; returns how many places that was."""
    for name, source in files.items():
        assert not (copy / name).exists()
        shutil.copy(source, copy / name)
    for name, before, line in edits:
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(before) == 1, (name, before)
        (copy / name).write_text(text.replace(before, line + before), encoding="utf-8")
    return len(files) + len({name for name, _, _ in edits})


def run(copy: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


EVALUATOR_FILES = {"fedlab/evaluate/toy_errors.py": TOY / "errors.py"}
EVALUATOR_EDITS: list[Edit] = [
    (
        "fedlab/evaluate/__init__.py",
        'EVALUATORS: dict[str, Evaluator] = {\n    "classification"',
        "from fedlab.evaluate import toy_errors\n\n\n",
    ),
    ("fedlab/evaluate/__init__.py", "\n}\n\n\ndef evaluators_of", '\n    "toy-errors": toy_errors.EVALUATOR,'),
    ("docs/objectives.md", "| `classification` | classification |", "| `toy-errors` | toy-regression | errors |\n"),
]


def test_an_evaluator_is_added_in_three_places(copy: Path):
    assert add(copy, EVALUATOR_FILES, EVALUATOR_EDITS) == 3
    run(copy, "tests/objectives/test_contract.py", "-k", "docs or itself")


def test_an_objective_is_added_in_four_places(copy: Path):
    add(copy, EVALUATOR_FILES, EVALUATOR_EDITS)  # an objective whose scores nobody gives yet needs an evaluator, too
    edits: list[Edit] = [
        (
            "fedlab/objectives/__init__.py",
            "\nOBJECTIVES: dict",
            "from fedlab.objectives.toy_regression import ToyRegression\n",
        ),
        (
            "fedlab/objectives/__init__.py",
            "\n}\n\n\ndef objective_class",
            '\n    "toy-regression": ToyRegression,',
        ),
        (
            "tests/objectives/test_contract.py",
            "\n}\nGENERATIVE",
            '\n    "toy-regression": lambda words: str(words / 10),',
        ),
        ("docs/objectives.md", "| `classification` | one label", "| `toy-regression` | a number |\n"),
    ]
    assert add(copy, {"fedlab/objectives/toy_regression.py": TOY / "regression.py"}, edits) == 4
    run(copy, "tests/objectives/test_contract.py", "-k", "toy or docs")
