"""The import rules of the design, read from the source with ``ast``."""

from __future__ import annotations

import ast
import os
import shutil
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedlab", "strategies", "clients")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {
    path.relative_to(ROOT).as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
    for path in FILES
}
TENSORS_ONLY = ("fedlab/lora", "fedlab/privacy", "fedlab/continual", "fedlab/objectives")
KNOW_FLOWER = ("strategies/app.py", "strategies/server/", "clients/app.py", "fedlab/run/launch/")
CIRCLES_LEFT = ["fedlab.run.launch", "fedlab.run.launch.stream"]  # whoever ends one takes it out


def imports(path: Path) -> set[str]:
    """Whatever a file imports, also inside functions and under TYPE_CHECKING: modules, and names in modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def arrows(path: Path) -> set[str]:
    """Modules of ours that a file imports. ``from package import module`` is an arrow to the module."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in imports(path)} & MODULES.keys()


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that can be reached from themselves."""
    reach = {name: set(after) for name, after in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return sorted(name for name in graph if name in reach[name])


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=where)
def test_import_rules(path: Path):
    place, names = where(path), packages(path)
    if place.startswith("fedlab/"):
        assert not names & {"strategies", "clients"}, "the library imports neither strategies nor clients"
    if place.startswith("strategies/"):
        assert "clients" not in names
    if place.startswith("clients/"):
        assert "strategies" not in names
    if place.startswith("strategies/") and place.count("/") == 1 and path.name != "app.py":
        assert not any(name.startswith("strategies.server") for name in imports(path)), "an algorithm knows no server"
    if place.startswith(TENSORS_ONLY):
        assert not names & {"flwr", "ray", "transformers"}
    if place.startswith(("fedlab/protocol", "fedlab/config")):
        assert not names & {"flwr", "ray", "torch", "transformers"}, "messages and configuration are plain values"
    if not place.startswith(KNOW_FLOWER):
        assert "flwr" not in names, f"only {', '.join(KNOW_FLOWER)} know Flower"
    if not place.startswith("fedlab/run/launch/"):
        assert "ray" not in names, "only fedlab.run.launch knows Ray"


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_no_circle_of_imports():
    assert circles({name: arrows(path) - {name} for name, path in MODULES.items()}) == CIRCLES_LEFT


def test_no_file_is_longer_than_400_lines_and_half_are_shorter_than_150():
    lengths = {where(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert [place for place, length in lengths.items() if length > 400] == []
    assert statistics.median(lengths.values()) <= 150


def test_lines_have_120_columns():
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert ruff["line-length"] == 120
    assert [name for name in ruff["lint"]["per-file-ignores"] if not (ROOT / name).is_file()] == []
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "E501", *PACKAGES, "tests", "simulations"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_every_package_is_typed():
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_simulations_is_no_package():
    assert not list((ROOT / "simulations").rglob("__init__.py"))


def test_the_repository_root_is_a_flower_app(tmp_path: Path):
    """``flwr build`` refuses patterns that match nothing and names that Flower cannot carry."""
    for name in (*PACKAGES, "simulations", "docs"):
        shutil.copytree(ROOT / name, tmp_path / "fedlab" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / "fedlab" / name)
    flwr = Path(sys.executable).parent / "flwr"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [flwr, "build", "--app", "fedlab"],
        cwd=tmp_path,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (fab,) = tmp_path.rglob("*.fab")
    names = zipfile.ZipFile(fab).namelist()
    assert {"strategies/app.py", "clients/app.py", "fedlab/run/launch/ray.py", "simulations/quickstart.toml"} <= set(
        names
    )
