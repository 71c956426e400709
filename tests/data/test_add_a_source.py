"""A data source is added in three places: its file, its line in SOURCES, its name among the choices of data.source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from fedlab.config.data import DataSection
from fedlab.data.sources import SOURCES

ROOT = Path(__file__).resolve().parents[2]
TOY = '''"""Numbers in words: a toy source."""

from fedlab.config.data import DataSection
from fedlab.data.corpus import Corpus, written


def check(data: DataSection) -> None:
    """Always there."""


def load(data: DataSection) -> Corpus:
    """Ninety of them."""
    return Corpus("toy", [f"number {i}" for i in range(90)], written(["odd" if i % 2 else "even" for i in range(90)]))
'''
PLACES = {
    "its file": ("fedlab/data/toy.py", "", TOY),
    "its line": (
        "fedlab/data/sources.py",
        "SOURCES: dict[str, Source] = {",
        'from fedlab.data import toy\n\nSOURCES: dict[str, Source] = {\n    "toy": Source(toy.load, toy.check),',
    ),
    "its name": ("fedlab/config/data.py", 'source: Literal["docstrings",', 'source: Literal["toy", "docstrings",'),
}
CODE = """
from fedlab.config.data import DataSection
from fedlab.data.partition import assign
from fedlab.data.sources import check_source, load_corpus
data = DataSection(source="toy", clients=3)
check_source(data)
print({client: len(held) for client, held in assign(load_corpus(data, 0), data, 0).train.items()})
"""


def run(tree: Path, *places: str) -> subprocess.CompletedProcess[str]:
    """The code on a copy of the library with the toy source entered in these places."""
    shutil.copytree(ROOT / "fedlab", tree / "fedlab", ignore=shutil.ignore_patterns("__pycache__"))
    for place in places:
        file, before, after = PLACES[place]
        path, text = tree / file, after
        if before:
            assert path.read_text().count(before) == 1
            text = path.read_text().replace(before, after.replace("\\\n", "\n"))
        path.write_text(text)
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", CODE], cwd=tree, env=environment, capture_output=True, text=True)


def test_three_places_are_enough(tmp_path: Path):
    done = run(tmp_path, *PLACES)
    assert done.stdout.strip() == "{'client-0': 27, 'client-1': 27, 'client-2': 27}", done.stderr


@pytest.mark.parametrize("missing", PLACES)
def test_and_each_of_them_is_needed(missing: str, tmp_path: Path):
    assert run(tmp_path, *(place for place in PLACES if place != missing)).returncode != 0


def test_every_source_can_be_chosen_and_every_choice_is_a_source():
    assert set(SOURCES) == set(get_args(DataSection.model_fields["source"].annotation))
