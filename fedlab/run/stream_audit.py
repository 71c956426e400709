"""The audit of a stream: every task's run, and what joins them.

Each task is audited like any run. The stream's own files must follow from the tasks': its configuration makes each
task's, its result and page are made again and compared byte by byte, and the ledger that the tasks share ends where the
last task's copy ends. So a task that was taken away, or a number of the whole that was edited, is found.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlab.config import RunConfig
from fedlab.errors import FedlabError
from fedlab.privacy.audit.directory import AuditedDirectory, read_result
from fedlab.privacy.audit.files import TABLE
from fedlab.privacy.audit.render import headed, render
from fedlab.privacy.audit.run import RunAudit, Verdict, audit_run
from fedlab.report.stream import render_stream_report
from fedlab.run.directory import FINISHED, json_text
from fedlab.run.launch.stream import collect, stages
from fedlab.run.regenerate import regenerate

RANK: tuple[Verdict, ...] = ("verified", "no-dp", "consistent", "incomplete", "failed")  # a stream is its weakest part
OWN = ("run.toml", "result.json", "report.html")


@dataclass(frozen=True)
class StreamAudit:
    """What the audit of a stream found: of the whole, and of each task."""

    verdict: Verdict
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    not_covered: tuple[str, ...]
    tasks: Mapping[str, RunAudit]

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON."""
        tasks = {name: audit.to_dict() for name, audit in self.tasks.items()}
        lists = {name: list(getattr(self, name)) for name in ("findings", "notes", "not_covered")}
        return {"verdict": self.verdict, **lists, "tasks": tasks}


def audit_stream(
    path: Path, keys: Mapping[str, str] | None = None, kept: Mapping[str, bytes] | None = None
) -> StreamAudit:
    """Check a stream's directory; never an exception for a damaged one. Arguments as for ``audit_run``."""
    audit = AuditedDirectory(path)
    config, text = _config(audit)
    there = sorted(
        name.removesuffix("/run.toml")
        for name in audit.files.sizes
        if name.count("/") == 1 and name.endswith("/run.toml")
    )
    tasks = {name: audit_run(path / name, keys, kept, regenerate) for name in there}
    result = read_result(audit)
    finished = result.get("status") in FINISHED
    if config is not None and not any(one.findings for one in tasks.values()):
        _check_tasks(audit, config, text, there, str(result.get("status", "cut off")))
        if not audit.findings and finished:
            _check_whole(audit, config, [path / name for name in there], result)
        _check_ledgers(audit, there, finished)
    for name in sorted(audit.files.sizes):
        shared = name.startswith("ledger/") and name.endswith(".jsonl")
        if not shared and name not in OWN and name.partition("/")[0] not in there:
            audit.leave(f"{name}: nothing of the stream is made from it")
    parts: list[Verdict] = [one.verdict for one in tasks.values()]
    if audit.findings:
        parts.append("failed")
    if not finished or not tasks:
        parts.append("incomplete")
    verdict = max(parts, key=RANK.index)
    found = tuple(dict.fromkeys(map(str, audit.findings)))
    return StreamAudit(verdict, found, tuple(audit.notes), tuple(audit.uncovered), tasks)


def _config(audit: AuditedDirectory) -> tuple[RunConfig | None, str]:
    data = audit.read("run.toml")
    try:
        text = (data or b"").decode("utf-8")
        return RunConfig.parse(text), text
    except (FedlabError, ValueError) as error:
        audit.find("run.toml", f"cannot be read: {error}")
        return None, ""


def _check_tasks(audit: AuditedDirectory, config: RunConfig, text: str, there: list[str], status: str) -> None:
    """The tasks are those of the configuration, in order, each with the configuration that the stream's makes."""
    names = [folder.name for folder, _ in stages(config, audit.root)]
    if config.to_toml() != text:
        audit.find("run.toml", "is not in the form that a run writes: it was edited")
    for name in there:
        if name not in names:
            audit.find(name, "is no task of this stream")
    if there != names[: len(there)]:
        audit.find("run.toml", f"its tasks are {', '.join(names)}; there are {', '.join(there) or 'none'}")
    elif status == "completed" and len(there) < len(names):
        audit.find(names[len(there)], "is missing, though the stream was completed")
    for number, name in enumerate(there if not audit.findings else ()):
        own = (audit.read(f"{name}/run.toml") or b"").decode("utf-8", "replace")
        previous = tomllib.loads(own).get("stage", {}).get("previous")
        if (Path(previous).name if previous else None) != (names[number - 1] if number else None):
            audit.find(name, f"goes on from {previous!a}, not from the task before it")
        elif config.at_stage(number, previous).to_toml() != own:
            audit.find(name, "has another configuration than the stream's makes")


def _check_whole(audit: AuditedDirectory, config: RunConfig, done: list[Path], result: Mapping[str, Any]) -> None:
    """The stream's result and page are what its tasks make."""
    try:
        last = json.loads((done[-1] / "result.json").read_text(encoding="utf-8"))["status"]
        whole = {"status": last, **collect(config, done)}
        made = {"result.json": json_text(whole), "report.html": render_stream_report(audit.root, dict(result))}
    except Exception as error:  # whatever a forged file makes the product's code do is a finding
        audit.find("result.json", f"cannot be made from the tasks ({type(error).__name__})")
        return
    for name, text in made.items():
        if audit.read(name, TABLE) != text.encode():
            audit.find(name, "is not what the tasks make: it was edited, or a task was taken away")


def _check_ledgers(audit: AuditedDirectory, there: list[str], finished: bool) -> None:
    """The ledgers that the tasks share end where the last task's copies end."""
    shared = [name for name in audit.files.under("ledger") if name.endswith(".jsonl")]
    there_too = {name.rpartition("/")[2] for name in shared}
    for held in audit.files.under(f"{there[-1]}/ledger") if shared and finished else ():
        if held.endswith(".jsonl") and held.rpartition("/")[2] not in there_too:
            audit.find(held, "is a copy of a ledger that the stream has no more")
    for name in shared:
        whole = audit.read(name, TABLE) or b""
        file = name.rpartition("/")[2]
        copies = [copy for task in there if (copy := audit.read(f"{task}/ledger/{file}", TABLE)) is not None]
        if any(not whole.startswith(copy) for copy in copies):
            audit.find(name, "does not begin with what a task's copy of it shows")
        elif finished and (not copies or whole != copies[-1]):
            audit.find(name, "goes on after the last task that is there: a task was taken away")
        elif finished and f"{there[-1]}/ledger/{file}" not in audit.files:
            audit.find(f"{there[-1]}/ledger/{file}", "is missing: the stream's ledger has it")


def render_stream(audit: StreamAudit) -> str:
    """The human form: the whole first, then each task."""
    lines = [f"stream {headed(audit.verdict, len(audit.findings))}", *audit.findings]
    lines += [f"note: {note}" for note in audit.notes] + [f"not covered: {text}" for text in audit.not_covered]
    tasks = [f"{name}\n{render(one)}" for name, one in audit.tasks.items()]
    return "\n\n".join(["\n".join(lines), *tasks]).encode("utf-8", "backslashreplace").decode("utf-8")
