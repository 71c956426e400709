"""The report's figures, as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is touched
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "fedlab"  # the same figure is the same bytes: an audit compares them

INK, LINE, SECOND = "#333333", "#2563eb", "#c2410c"


def line_chart(
    title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str, xlabel: str = "round"
) -> str:
    """SVG of one or two curves over rounds, or something else; ``series`` maps a label to (rounds, values)."""
    figure, axes = _figure()
    for (label, (x, y)), color in zip(series.items(), (LINE, SECOND, INK), strict=False):
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.4, color=color, label=label)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if len(series) > 1:
        axes.legend(frameon=False)
    return _svg(figure)


def bar_chart(title: str, names: Sequence[str], values: Sequence[float], ylabel: str) -> str:
    """SVG of one bar per client."""
    figure, axes = _figure()
    axes.bar(range(len(values)), values, color=LINE)
    axes.set(title=title, ylabel=ylabel)
    if len(names) <= 16:
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    else:
        axes.set_xlabel("client")
    return _svg(figure)


def heat_map(title: str, matrix: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]) -> str:
    """SVG of numbers as colours, from 0 to 1 or to the largest, each written into its cell; NaN cells stay empty."""
    largest = max([1.0, *(value for row in matrix for value in row if value == value)])
    figure = Figure(figsize=(2.2 + 1.1 * len(columns), 1.4 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=largest, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(title, fontsize=10)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value == value:
                axes.text(
                    j, i, f"{value:.3f}", ha="center", va="center", color="white" if value > 0.6 * largest else INK
                )
    return _svg(figure)


def _figure() -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
