"""The audit of a stream: the whole must follow from its tasks, and no task may be taken away."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fedlab
from fedlab.config import RunConfig
from fedlab.run.stream_audit import StreamAudit, audit_stream, render_stream

DP = ["privacy={unit='example', sigma=1.0, clip=1.0}", "run.rounds=1", "strategy={name='fedavg'}"]


@pytest.fixture
def stream(stream_toml: str, tmp_path: Path) -> Path:
    return fedlab.simulate(RunConfig.parse(stream_toml, DP), tmp_path / "run", quiet=True).path


def audited(path: Path, copy: Path, change: Callable[[Path], object]) -> StreamAudit:
    shutil.copytree(path, copy)
    change(copy)
    return audit_stream(copy)


def edit(name: str, **more: object) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        value = json.loads((root / name).read_text()) | more
        (root / name).write_text(json.dumps(value, indent=2) + "\n")

    return change


def keys_of(path: Path, tasks: list[str]) -> dict[str, str]:
    start = json.loads((path / tasks[0] / "receipts.jsonl").read_text().splitlines()[0])
    return {"server": start["key"], **start["clients"]}


def test_a_stream_is_audited_as_a_whole(stream: Path, tmp_path: Path, drawn_once: None):
    assert not list(stream.rglob("*.pem")), "the keys go with the last task"
    left = [f for f in (stream / "ledger").rglob("*") if f.is_file()]
    assert {f.suffix for f in left} == {".jsonl"}, "and who held which record"
    tasks = sorted(p.name for p in stream.glob("task-*"))
    moved = tmp_path / "elsewhere"
    shutil.copytree(stream, moved)
    for place in (stream, moved):
        audit = audit_stream(place)
        assert (audit.verdict, audit.findings) == ("consistent", ()), audit
        assert list(audit.tasks) == tasks
    said = render_stream(audit)
    assert said.startswith("stream CONSISTENT: it fits together. Whoever can write this directory could have made all")
    assert all(f"\n{task}\nCONSISTENT: " in said for task in tasks)
    published = keys_of(stream, tasks)
    kept = {"kept": next((stream / "ledger").rglob("client-0.jsonl")).read_bytes()}
    assert audit_stream(stream, published).verdict == "verified"
    assert audit_stream(stream, None, kept).verdict == "verified"
    last = stream / tasks[-1]
    forgeries: dict[str, Callable[[Path], object]] = {
        "last task gone": lambda root: shutil.rmtree(root / last.name),
        "first task gone": lambda root: shutil.rmtree(root / tasks[0]),
        "result": edit("result.json", epsilon=0.001),
        "score": edit("result.json", average_score=0.999),
        "status": edit("result.json", status="budget-exhausted"),
        "task result": edit(f"{last.name}/result.json", epsilon=0.001),
        "task scores": edit(f"{last.name}/task.json", pooled=[1.0, 1.0]),
        "memory": lambda root: (root / last.name / "memory.safetensors").write_bytes(b"x"),
        "page": lambda root: (root / "report.html").write_text("<p>ε = 0.01</p>"),
        "configuration": lambda root: _replace(root / "run.toml", "sigma = 1.0", "sigma = 9.0"),
        "renamed": lambda root: (root / last.name).rename(root / "task-1-other"),
        "ledger": lambda root: _cut(next((root / "ledger").rglob("client-0.jsonl"))),
        "pipe": lambda root: os.mkfifo(root / "ledger" / "pipe.jsonl"),
        "linked": lambda root: (root / "more").symlink_to(stream),
    }
    for number, (name, change) in enumerate(forgeries.items()):
        audit = audited(stream, tmp_path / str(number), change)
        assert audit.verdict == "failed", name
    unfinished = audited(stream, tmp_path / "cut", lambda root: (root / "result.json").unlink())
    assert unfinished.verdict == "incomplete"
    both = audited(
        stream, tmp_path / "both", lambda root: (shutil.rmtree(root / last.name), (root / "result.json").unlink())
    )
    assert both.verdict == "incomplete", "of a stream that says nothing, what is there is what is there"


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes().rstrip(b"\n").rpartition(b"\n")[0] + b"\n")


def test_a_ledger_that_the_stream_has_no_more_is_missed(stream: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(stream, moved)
    one = next((moved / "ledger").rglob("client-1.jsonl"))
    one.unlink()
    one.mkdir()
    found = audit_stream(moved)
    assert found.verdict == "failed"
    assert "the stream has no more" in " ".join(found.findings)
