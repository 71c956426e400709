"""What a run shows while it runs: a live table on a terminal, one plain line per round when piped, nothing with
``--quiet``.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from fedlab.config import RunConfig
from fedlab.evaluate import score_names
from fedlab.privacy import promise
from fedlab.privacy.promise import shown_epsilon
from fedlab.run.deployment import Deployment
from fedlab.run.output import console, is_live, say

SHOWN_ROUNDS = 12


@dataclass(frozen=True)
class RoundLine:
    """One finished round. ``scores`` is None in rounds without evaluation; ``loss`` is nan where it is not shared."""

    number: int
    scores: dict[str, float] | None
    train_loss: float
    epsilon: float | str
    worst_client: float | None
    clients: int
    seconds: float
    overhead: float


class Progress:
    """Says nothing. The base of the other two, and what ``--quiet`` uses."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop showing."""

    def note(self, text: str) -> None:
        """What is being done right now."""

    def remark(self, text: str) -> None:
        """Something to know, on a line of its own."""

    def round_started(self, number: int, clients: int) -> None:
        """A round's messages are out."""

    def node_done(self) -> None:
        """One node replied."""

    def round_done(self, line: RoundLine) -> None:
        """A round is over."""

    def finished(self, result: dict[str, Any]) -> None:
        """The run is over."""


class PlainProgress(Progress):
    """One line per round on standard output."""

    def __init__(self, config: RunConfig, path: Path) -> None:
        self._config, self._path = config, path

    def __enter__(self) -> Progress:
        say(headline(self._config, self._path))
        return self

    def remark(self, text: str) -> None:
        say(text)

    def round_done(self, line: RoundLine) -> None:
        cells = _cells(line, score_names(self._config))
        shown = "  ".join(f"{name} {value}" for name, value in cells.items() if value not in ("", "–"))
        say(shown.replace("round ", f"round {'' if line.number > 9 else ' '}", 1))

    def finished(self, result: dict[str, Any]) -> None:
        say(closing(self._config, result, self._path))


class LiveProgress(Progress):
    """A table of the last rounds over a progress bar."""

    def __init__(self, config: RunConfig, path: Path) -> None:
        self._config, self._path, self._console = config, path, console()
        self._lines: list[RoundLine] = []
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("starting", total=config.run.rounds)
        self._live = Live(self._render(), console=self._console, refresh_per_second=4)
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        self._console.print(headline(self._config, self._path), soft_wrap=True)
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.update(self._render())
        self._live.__exit__(kind, error, trace)

    def note(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def remark(self, text: str) -> None:
        self._live.console.print(text)

    def round_started(self, number: int, clients: int) -> None:
        self.note(f"round {number}: {clients} clients training")

    def node_done(self) -> None:
        self.note(f"{self._bar.tasks[0].description.removesuffix(' ·')} ·")

    def round_done(self, line: RoundLine) -> None:
        self._lines.append(line)
        self._bar.update(self._task, completed=line.number)
        self._live.update(self._render())

    def finished(self, result: dict[str, Any]) -> None:
        self.note(result["status"])
        self._live.update(self._render())
        self._live.stop()
        self._console.print(closing(self._config, result, self._path), soft_wrap=True)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        rows = [_cells(line, score_names(self._config)) for line in self._lines[-SHOWN_ROUNDS:]]
        for name in rows[0] if rows else ():
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row.values())
        return Group(table, self._bar) if rows else Group(self._bar)


def _cells(line: RoundLine, scores: list[str]) -> dict[str, str]:
    """Column → what a round shows in it."""
    return {
        "round": str(line.number),
        **{name: f"{line.scores[name]:.4f}" if line.scores else "" for name in scores},
        "worst client": "–" if line.worst_client is None else f"{line.worst_client:.4f}",
        "ε (worst client)": shown_epsilon(line.epsilon),
        "clients": str(line.clients),
        "seconds": f"{line.seconds:.1f}",
        "overhead": f"{line.overhead:.2f}",
    }


def headline(config: RunConfig, path: Path) -> str:
    """What is about to run, in two lines."""
    where = config.data.source if Deployment.of(path) is None else "clients' own data"
    return (
        f"fedlab: {config.strategy.name} on {where}, {config.population} clients, {config.run.rounds}"
        f" rounds, {config.model.name}, LoRA rank {config.lora.rank}, {promise.headline(config)}\n{path}"
    )


def closing(config: RunConfig, result: dict[str, Any], path: Path) -> str:
    """What came out, in a few lines."""
    spent = promise.closing(config, result["epsilon"])
    spread = result["client_scores"]
    figures = ", ".join(f"{name} {shown(value)}" for name, value in spread.items() if name != "curve")
    sigma = config.privacy.scores_sigma
    noised = "" if sigma is None else f" (each with noise of σ = {sigma:g} on the number of right ones, cut to 0..1)"
    clients = "" if spread["mean"] is None else f"clients' {result['primary']}: {figures}{noised}\n"
    scores = ", ".join(f"{name} {shown(value)}" for name, value in (result["scores"] or {}).items())
    per_round = result["seconds_per_round"]
    overhead = (
        ""
        if per_round is None
        else (
            f", {result['overhead_seconds_per_round']:.2f} s of {per_round:.2f} s per round outside training and"
            " evaluation"
        )
    )
    drift = result.get("drift") or {}
    perplexities = ", ".join(f"{shown(one['perplexity'])} {when}" for when, one in drift.items())
    public = f"perplexity of public text: {perplexities}\n" if perplexities else ""
    learnt = "".join(f"{promise.plain(text)}\n" for text in promise.memorised(result.get("memorisation")))
    warnings = "".join(f"\nwarning: {text}" for text in result.get("warnings", ()))
    return (
        f"{result['status']}: {scores or 'not evaluated'}, {spent}{warnings}\n{learnt}"
        f"{clients}{public}{result['bytes_up'] / 1e6:.2f} MB up,"
        f" {result['bytes_down'] / 1e6:.2f} MB down, {result['seconds']:.1f} s{overhead}\nadapter:"
        f" {path / 'adapter'}\nreport:  {path / 'report.html'}"
    )


def shown(value: float | None) -> str:
    """A score for people."""
    return "–" if value is None or math.isnan(value) else f"{value:.4f}"


def make_progress(config: RunConfig, path: Path, quiet: bool) -> Progress:
    """Live on a terminal, plain lines when piped, silent when asked."""
    if quiet:
        return Progress()
    return LiveProgress(config, path) if is_live() else PlainProgress(config, path)
