"""What the benchmarks share: arguments, timing in turn, medians, tables in markdown, results as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "simulations"
Ways = Mapping[str, Callable[[], object]]


def parser(description: str | None, config: str | None = None) -> argparse.ArgumentParser:
    """A parser with ``--json FILE`` and, for a benchmark that runs a preset, ``--config`` and ``--set``.

    Args:
        description: the script's docstring.
        config: the preset that is run by default, or "" for none; None: the benchmark runs no configuration.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    if config is not None:
        made.add_argument("--config", type=Path, default=PRESETS / config if config else None)
        made.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    return made


def write_json(path: Path | None, value: object) -> None:
    """Write the results of ``--json FILE``; nothing without it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def interleaved(
    ways: Ways,
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    before: Callable[[str], object] = lambda way: None,
    after: Callable[[str], object] = lambda way: None,
) -> dict[str, list[float]]:
    """Seconds of every way, all ways in turn in each repeat, after one turn that is not counted.

    Args:
        ways: name → what is timed.
        repeats: how often each is timed.
        clock: ``process_time`` for processor seconds, ``perf_counter`` for wall seconds.
        before: called with the way's name before the clock starts.
        after: called when the clock is about to stop, e.g. to wait for a device.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, action in ways.items():
            before(way)
            started = clock()
            action()
            after(way)
            if repeat:
                seconds[way].append(clock() - started)
    return seconds


def half_range(values: Sequence[float]) -> float:
    """Half of the distance between the largest and the smallest value: what follows ± beside a median of times."""
    return (max(values) - min(values)) / 2


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds, without the latter for one seed; a dash for none."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def header(*cells: str) -> str:
    """The first two lines of a table in markdown."""
    return f"{line(*cells)}\n" + "|---" * len(cells) + "|"


def line(*cells: object) -> str:
    """One line of a table in markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"


def metrics(run: Path, phase: str) -> list[dict[str, Any]]:
    """A run's lines of ``metrics.jsonl`` of one phase, in order."""
    lines = (json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [found for found in lines if found["phase"] == phase]
