"""The forger with a finished private stream: every file and line of the whole and of its tasks."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.run.stream_audit import audit_stream

_spec = importlib.util.spec_from_file_location("forging", Path(__file__).with_name("forging.py"))
forging: Any = importlib.util.module_from_spec(_spec)
sys.modules["forging"] = forging
_spec.loader.exec_module(forging)

DP = ["privacy={unit='example', sigma=1.0, clip=1.0}", "run.rounds=1", "strategy={name='fedavg'}"]


def changes(files: dict[str, bytes], tasks: list[str], outside: Path) -> list[Any]:
    roots = [f"{task}/" for task in tasks]
    single = [
        *forging.lines_of(files),
        *forging.values_of(files),
        *forging.words_of(files),
        *forging.bytes_of(files, 4),
    ]
    return [*single, *forging.files_of(files, outside, roots)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("step", [199, pytest.param(5, marks=pytest.mark.slow)])
def test_no_mutation_of_a_stream_passes(stream_toml: str, tmp_path: Path, step: int, drawn_once: None):
    path, outside = fedlab.simulate(RunConfig.parse(stream_toml, DP), tmp_path / "run", quiet=True).path, tmp_path / "x"
    outside.mkdir()
    files = {f.relative_to(path).as_posix(): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}
    tasks = sorted({name.partition("/")[0] for name in files if name.startswith("task-")})
    start = json.loads(files[f"{tasks[0]}/receipts.jsonl"].split(b"\n")[0])
    published = {"server": start["key"], **start["clients"]}
    true = audit_stream(path, published)
    assert true.verdict == "verified"
    named = [text.partition(":")[0] for text in true.not_covered]
    assert named == ["environment.json"], "what its tasks have, each under its seal"
    made = changes(files, tasks, outside)
    assert len(made) >= 500
    passed, unfinished = [], []
    for what, change in made[1::step]:
        change(path)
        audit = audit_stream(path)
        if audit.verdict != "failed":  # keys only add findings
            audit = audit_stream(path, published)
            unfinished.append((what, audit.verdict))
        if audit.verdict not in ("failed", "incomplete") and not what.startswith(tuple(named)):
            passed.append((what, audit.verdict, audit.not_covered))
        forging.replace_tree(path, files)
    print(f"{len(made[1::step])} of {len(made)} mutations of {len(files)} files; not failed: {unfinished}")
    assert passed == []
    assert audit_stream(path, published).verdict == "verified"
