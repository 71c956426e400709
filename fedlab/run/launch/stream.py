"""A stream of tasks: a sequence of runs, each from what the one before left, on one Ray; and one result over all of
them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedlab.config import RunConfig
from fedlab.continual.metrics import forward_transfer, summary
from fedlab.errors import ConfigError, FedlabError, Interrupted, RunFailed
from fedlab.evaluate import higher_is_better, primary_name
from fedlab.privacy.promise import shown_epsilon
from fedlab.run import interrupt
from fedlab.run.directory import RunDirectory
from fedlab.run.launch import Run, prepared, simulate_or_resume
from fedlab.run.output import say

TASK = "task.json"
WHERE = {"source", "path", "subset", "split"}  # keys of [data] that say which texts


def simulate_stream(config: RunConfig, out: str | Path | None = None, quiet: bool = False) -> Run:
    """Run every task of ``config.tasks`` in order, in ``out/task-<n>-<name>``; ``out/result.json`` has the matrix of
    scores.

    Raises what ``simulate`` raises; ``fedlab resume out`` then goes on where it stopped.
    """
    from fedlab.run.deals import check_deals

    config = with_ledger(prepared(config, out), out)
    check_deals(config, Path())  # again: the tasks share a ledger now
    return _go_on(RunDirectory.create(config, Path(out) if out is not None else None), quiet)


def resume_stream(path: str | Path, quiet: bool = False) -> Run:
    """Go on with a stream: finished tasks stay, the one that was cut off is resumed, the others follow."""
    directory = RunDirectory.open(Path(path))
    if directory.finished:
        raise ConfigError(f"{str(path)!r} is {directory.finished['status']}; there is nothing to resume")
    _check_unchanged(directory.config, directory.path)
    return _go_on(directory, quiet)


def _check_unchanged(config: RunConfig, path: Path) -> None:
    """Raise ConfigError unless the data are what the stream's runs so far began with."""
    from fedlab.run.data import DATA, check_unchanged

    for folder, stage in stages(config, path):
        if (folder / DATA).is_file():
            check_unchanged(folder, stage)


def with_ledger(config: RunConfig, out: str | Path | None) -> RunConfig:
    """Private streams charge one ledger over all tasks: the same texts may come again.

    Raises ConfigError where that has no place.
    """
    if not config.private:
        return config
    if config.privacy.ledger is not None:
        own = next(((task.name, key) for task in config.tasks for key in sorted(task.data.keys() & WHERE)), None)
        if own:
            raise ConfigError(
                f"privacy.ledger with tasks: {own[0]} sets data.{own[1]}, but a ledger is kept per data source; leave"
                " privacy.ledger out, or name all texts in [data]"
            )
        return config
    if out is None:
        raise ConfigError(
            "a stream under DP needs --out, or privacy.ledger: all its tasks charge one ledger, which must have a place"
        )
    return config.model_copy(
        update={"privacy": config.privacy.model_copy(update={"ledger": str(Path(out).absolute() / "ledger")})}
    )


def stages(config: RunConfig, path: Path) -> list[tuple[Path, RunConfig]]:
    """Directory and configuration of every task's run."""
    found: list[tuple[Path, RunConfig]] = []
    for number, task in enumerate(config.tasks):
        previous = str(found[-1][0]) if found else None
        name = "joint" if config.stream.joint else f"task-{number}-{task.name}"
        found.append((path / name, config.at_stage(number, previous)))
        if config.stream.joint:
            break
    return found


def _go_on(directory: RunDirectory, quiet: bool) -> Run:
    from fedlab.report.stream import write_stream_report
    from fedlab.run.data import check_unchanged, refresh
    from fedlab.run.launch.ray import keep_ray

    config, runs = directory.config, stages(directory.config, directory.path)
    status, done = "completed", list[Path]()
    with keep_ray(), _told(directory, done):
        for number, (path, stage) in enumerate(runs, 1):
            if not quiet:
                say(f"\n[{number}/{len(runs)}] {path.name}")
            for before in done[-1:]:  # a file that changes between two tasks
                refresh(stage)
                check_unchanged(before, stage)
            status = simulate_or_resume(path, stage, quiet).result["status"]
            if not (path / TASK).is_file():
                raise RunFailed(f"{path} ended without {TASK}; see {path / 'log.txt'}")
            done.append(path)
            if status == "budget-exhausted":  # whoever could not cover a round of this task covers none of the next
                break
    result = collect(config, done)
    _destroy_keys(config, directory.path)
    directory.write_json("result.json", {"status": status, **result})
    write_stream_report(directory.path)
    if not quiet:
        say(render(result))
    finished = directory.result
    assert finished is not None
    return Run(directory.path, finished)


@contextmanager
def _told(directory: RunDirectory, done: list[Path]) -> Iterator[None]:
    """Say in ``result.json`` and the report why the stream ended early, and what its finished tasks came to."""
    from fedlab.report.stream import write_stream_report

    try:
        yield
    except FedlabError as error:
        result: dict[str, Any] = {"status": "interrupted" if isinstance(error, Interrupted) else "failed"}
        with interrupt.deferred(), suppress(Exception):  # the first error is the one to show
            known = collect(directory.config, done) if done else {}
            directory.write_json("result.json", {**result, "reason": str(error), **known})
            if done:
                write_stream_report(directory.path)
        raise


def _destroy_keys(config: RunConfig, path: Path) -> None:
    """What only a further task needs goes with the last one, where no other run has the ledger: keys, and who held
    which record. Those of ``privacy.ledger`` elsewhere go on.
    """
    own = path / "ledger"
    if config.private and config.privacy.ledger == str(own):
        for file in sorted(own.rglob("*")):
            if file.is_file() and file.suffix != ".jsonl":
                file.unlink()
        for keys in own.glob("*/keys"):
            shutil.rmtree(keys, ignore_errors=True)


def collect(config: RunConfig, paths: list[Path]) -> dict[str, Any]:
    """The matrix R[t, i] of primary scores, its metrics, cost and privacy over all tasks."""
    rows = [json.loads((path / TASK).read_text(encoding="utf-8")) for path in paths]
    results = [RunDirectory.open(path).result or {} for path in paths]
    R = np.array([[math.nan if value is None else value for value in row["pooled"]] for row in rows])
    square, higher = len(R) == len(config.tasks), higher_is_better(config)
    found = (
        summary(R, higher) if square else {"average_score": float(np.nanmean(R[-1]))}
    )  # of the tasks that were reached
    if square and "before" in rows[0]:  # only a shared head can score a task before it was trained
        found["forward_transfer"] = forward_transfer(R, rows[0]["before"], higher)
    worst = [s.get("worst_tenth") for s in rows[-1]["spread"]]
    last = results[-1]
    leaks = [row["leak"] for row in rows if row["leak"] is not None]
    return {
        "strategy": config.strategy.name,
        "tasks": [task.name for task in config.tasks],
        "joint": config.stream.joint,
        "primary": primary_name(config),
        "matrix": R.tolist(),
        **found,
        "worst_tenth": float(np.mean(worst)) if worst and None not in worst else None,
        "leak": max(leaks) if leaks else None,
        "protected": rows[-1]["protected"],
        "bytes_up": sum(result["bytes_up"] for result in results),
        "bytes_down": sum(result["bytes_down"] for result in results),
        "boundary_seconds": [row["boundary_seconds"] for row in rows],
        "epsilon": last["epsilon"],
        "warnings": [
            f"{path.name}: {text}"
            for path, result in zip(paths, results, strict=True)
            for text in result.get("warnings", ())
        ],
        "epsilon_per_task": [result["epsilon"] for result in results],
        "seconds": round(sum(result["seconds"] for result in results), 2),
    }


def render(result: dict[str, Any]) -> str:
    """The matrix and the metrics, for a terminal."""
    names = result["tasks"]
    width = max(10, *(len(name) for name in names))
    lines = [
        f"\n{result['primary']} on each task (columns) after each task (rows)",
        " " * width + "".join(f"{name:>{width + 1}}" for name in names),
    ]
    labels = names[: len(result["matrix"])] if not result["joint"] else ["all"]
    for name, row in zip(labels, result["matrix"], strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{'–' if math.isnan(v) else f'{v:.4f}':>{width + 1}}" for v in row))
    shown = {
        "average_score": "average score",
        "backward_transfer": "backward transfer",
        "forgetting": "forgetting",
    }
    shown |= {"forward_transfer": "forward transfer", "learning_score": "learning score"}
    lines += [f"{label}: {result[key]:.4f}" for key, label in shown.items() if key in result]
    lines.append(f"ε over the whole stream: {shown_epsilon(result['epsilon'])}")
    lines += [f"warning: {text}" for text in result["warnings"]]
    return "\n".join(lines)
