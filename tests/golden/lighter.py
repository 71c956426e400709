"""Spares tiny runs what costs them half their time and changes no result: charts, templates, version look-ups.

Only third-party libraries are touched. Reports of runs that were made this way have no charts.
"""

from __future__ import annotations

import functools
import importlib.metadata
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

EMPTY = '<svg xmlns="http://www.w3.org/2000/svg"></svg>'


class Nothing:
    """Stands for matplotlib's axes: every attribute, item and call gives itself."""

    def __getattr__(self, name: str) -> Self:
        return self

    def __getitem__(self, key: object) -> Self:
        return self

    def __call__(self, *args: object, **options: object) -> Self:
        return self


def make_lighter() -> None:
    """Draw no charts; compile every template once, and look up every version once."""
    import jinja2
    from matplotlib.figure import Figure

    Figure.savefig = save_empty  # type: ignore[method-assign, assignment]
    Figure.add_subplot = lambda *args, **options: Nothing()  # type: ignore[method-assign, assignment]
    jinja2.Environment.compile = compile_once(jinja2.Environment.compile)  # type: ignore[method-assign]
    importlib.metadata.version = functools.cache(importlib.metadata.version)


def save_empty(figure: object, file: Any, **options: object) -> None:
    """Write an empty picture to a path, a text file or a binary file."""
    if not hasattr(file, "write"):
        Path(file).write_text(EMPTY)
    elif isinstance(file, io.TextIOBase):
        file.write(EMPTY)
    else:
        file.write(EMPTY.encode())


def compile_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """``jinja2.Environment.compile`` that remembers the code of every text."""
    known: dict[tuple[object, ...], Any] = {}

    def compiled(environment: Any, source: object, *args: object, **options: object) -> Any:
        if not isinstance(source, str):
            return original(environment, source, *args, **options)
        key = (source, args, tuple(sorted(options.items())), str(environment.autoescape), environment.trim_blocks)
        if key not in known:
            known[key] = original(environment, source, *args, **options)
        return known[key]

    return compiled
