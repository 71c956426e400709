"""Labels of texts that have any number of them, each kept as one string: JSON of the task and the labels' names.

The task is that of a stream whose tasks have heads of their own, and 0 elsewhere: a text without any label does not
tell by its labels which task it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping


def packed(names: Iterable[str], task: int = 0) -> str:
    """The one string of a text's labels."""
    return json.dumps([task, *sorted(set(names))], ensure_ascii=False)


def unpacked(label: str) -> tuple[int, list[str]]:
    """Task and labels' names of what ``packed`` gave."""
    task, *names = json.loads(label)
    return task, names


def moved(label: str, names: Mapping[str, str], task: int) -> str:
    """The same labels by other names, in a task."""
    return packed([names[name] for name in unpacked(label)[1]], task)
