"""Draw what ``make bench`` measured: runs/bench/*.json → docs/plots/*.svg.

python simulations/benchmarks/plots.py [runs/bench] [docs/plots]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from common import ROOT
from matplotlib.figure import Figure

AXES = ("clients", "rank", "modules", "length")


def main(source: Path, target: Path) -> list[Path]:
    """Draw every figure whose JSON is there; returns the files."""
    target.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["svg.hashsalt"] = "fedlab"  # the same file for the same numbers
    drawn = []
    if (file := source / "rounds.json").is_file():
        drawn.append(rounds(json.loads(file.read_text())["results"], target / "rounds.svg"))
    grown = {axis: json.loads(f.read_text())["rows"] for axis in AXES if (f := source / f"scale_{axis}.json").is_file()}
    if grown:
        drawn.append(growth(grown, target / "scale.svg"))
    return drawn


def rounds(results: dict[str, Any], path: Path) -> Path:
    """Seconds per round of every way, one panel per batch size."""
    figure = Figure(figsize=(4.2 * len(results), 3), layout="constrained")
    for axes, (batch, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        ways = result["ways"]
        spread = [way["spread"] for way in ways.values()]
        axes.bar(
            range(len(ways)),
            [way["median"] for way in ways.values()],
            yerr=spread,
            color="#2563eb",
            ecolor="#333333",
            capsize=3,
        )
        axes.set_xticks(range(len(ways)), list(ways), rotation=20, ha="right")
        axes.set(title=f"50 clients, batch {batch}", ylabel="seconds per round")
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def growth(rows: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Milliseconds per client and round, training and the rest, as one setting grows."""
    figure = Figure(figsize=(3.1 * len(rows), 2.8), layout="constrained")
    for axes, (axis, found) in zip(
        figure.subplots(1, len(rows), squeeze=False, sharey=True)[0], rows.items(), strict=True
    ):
        labels = [label(row) for row in found]
        clients = [row["clients_per_round"] for row in found]
        axes.plot(
            labels,
            [1000 * row["training"] / n for row, n in zip(found, clients, strict=True)],
            marker="o",
            label="training",
        )
        axes.plot(labels, [row["overhead_ms"] for row in found], marker="s", label="everything else")
        axes.set(title=axis, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("ms per client")
    figure.axes[0].legend(frameon=False)
    return _save(figure, path)


def label(row: dict[str, Any]) -> str:
    """What was set, short."""
    value = json.loads(row["setting"].partition("=")[2])
    return (
        ", ".join(value)
        if isinstance(value, list)
        else f"{row['clients_per_round']:.0f}"
        if "fraction" in row["setting"]
        else str(value)
    )


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    print(path)
    return path


if __name__ == "__main__":
    main(
        Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "bench",
        Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "plots",
    )
