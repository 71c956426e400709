"""The data of a stream: every task's texts in one corpus, each assigned to the same clients, under one label space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate

import numpy as np

from fedlab.data.corpus import Corpus, written
from fedlab.data.partition import Shards
from fedlab.data.reading import joined as joined_readings
from fedlab.data.several import moved
from fedlab.errors import ConfigError
from fedlab.seeds import random_stream


@dataclass(frozen=True)
class TaskData:
    """Who holds what of each task, and which labels a text is classified among."""

    shards: tuple[Shards, ...]  # per task, positions in the one corpus
    groups: np.ndarray | None  # label → task, for heads of their own; None if all share one label space

    def training(self, task: int, replay: float, joint: bool, seed: int) -> Shards:
        """What is trained on in a task: its own examples and a seeded share of each client's of earlier ones; all
        tasks' if ``joint``.
        """
        mine = self.shards[task]
        if joint:
            return Shards(
                {c: _union([s.train[c] for s in self.shards]) for c in mine.train},
                {c: _union([s.local_test[c] for s in self.shards]) for c in mine.train},
                _union([s.test for s in self.shards]),
                mine.names,
            )
        if not replay or not task:
            return mine
        train = {}
        for client, own in mine.train.items():
            parts = [own]
            for earlier in range(task):
                held = self.shards[earlier].train[client]
                count = round(replay * len(held))
                parts.append(random_stream(seed, "replay", client, earlier).choice(held, count, replace=False))
            train[client] = _union(parts)
        return replace(mine, train=train)

    def size(self, client: str, task: int, replay: float) -> int:
        """Examples that ``training`` gives a client in a task, without ``joint``."""
        return len(self.shards[task].train[client]) + sum(
            round(replay * len(s.train[client])) for s in self.shards[:task]
        )

    def outside(self, task: int, replay: float, joint: bool) -> np.ndarray:
        """Labels (bool [labels]) that this task's training has no example of, where heads are the tasks' own; none
        where shared.
        """
        if self.groups is None or joint:
            return np.zeros(0 if self.groups is None else len(self.groups), dtype=bool)
        return self.groups > task if replay else self.groups != task


@dataclass(frozen=True)
class LabelSpace:
    """The labels of all tasks of a stream as one classifier has them."""

    names: tuple[str, ...]
    positions: tuple[np.ndarray, ...]  # per task: position in ``names`` of each of its own labels
    groups: np.ndarray | None  # label → task, for heads of their own; None if all share one label space


def label_space(parts: Sequence[Corpus], tasks: Sequence[str], shared: bool) -> LabelSpace:
    """One label space for the tasks' corpora.

    With heads of their own, label names that two tasks use are told apart by the task's name.

    Args:
        parts: the tasks' corpora.
        tasks: their names.
        shared: whether labels of the same name are one label; otherwise each task has a head of its own.

    Raises:
        ConfigError: a task with a head of its own has fewer than 2 labels.
    """
    names = [list(part.label_names) for part in parts]
    groups = None
    if not shared and any(names):
        for task, own in zip(tasks, names, strict=True):
            if len(own) < 2:
                raise ConfigError(
                    f'tasks: {task} has {len(own)} label(s), a head of its own needs 2; or set stream.heads = "shared"'
                )
        if len({name for own in names for name in own}) < sum(map(len, names)):
            names = [[f"{task}/{name}" for name in own] for task, own in zip(tasks, names, strict=True)]
        groups = np.concatenate([np.full(len(own), i) for i, own in enumerate(names)])
    space = tuple(dict.fromkeys(name for own in names for name in own))
    position = {name: i for i, name in enumerate(space)}
    return LabelSpace(space, tuple(np.array([position[name] for name in own], dtype=np.int64) for own in names), groups)


def joined(parts: Sequence[Corpus], space: LabelSpace) -> tuple[Corpus, list[int]]:
    """The tasks' corpora one after the other under one label space, and where each begins.

    Raises ConfigError for a mix of texts and sentence pairs.
    """
    if len({part.pairs is None for part in parts}) > 1:
        raise ConfigError("tasks: some have sentence pairs and some single texts; one model cannot take both")
    corpus = Corpus(
        "+".join(dict.fromkeys(part.name for part in parts)),
        [text for part in parts for text in part.texts],
        np.concatenate([_in_space(part, space, i) for i, part in enumerate(parts)]),
        space.names,
        None if parts[0].pairs is None else [pair for part in parts for pair in part.pairs or []],
        reading=joined_readings([part.reading for part in parts if part.reading is not None]),
    )
    return corpus, [0, *accumulate(len(part) for part in parts[:-1])]


def _in_space(part: Corpus, space: LabelSpace, task: int) -> np.ndarray:
    """One task's labels in the label space of all."""
    own = space.positions[task]
    if part.several:
        names = {name: space.names[position] for name, position in zip(part.label_names, own, strict=True)}
        return written([moved(label, names, task if space.groups is not None else 0) for label in part.labels])
    found: np.ndarray = own[part.labels] if len(own) else part.labels
    return found


def check_same_clients(tasks: Sequence[str], shards: Sequence[Shards]) -> None:
    """Raises ConfigError unless every task has examples of the same clients."""
    for task, own in zip(tasks[1:], shards[1:], strict=True):
        for here, there, holder, lacking in ((own, shards[0], task, tasks[0]), (shards[0], own, tasks[0], task)):
            if missing := [client for client in here.train if client not in there.train]:
                raise ConfigError(
                    f"tasks: {missing[0]} has examples of {holder} and none of {lacking}; all tasks of a stream are met"
                    " by the same clients"
                )


def with_labels(corpus: Corpus, patterns: Sequence[str], task: str) -> Corpus:
    """The texts whose label matches a pattern, with those labels alone.

    Raises ConfigError for a pattern that matches none.
    """
    if not patterns:
        return corpus
    if not corpus.label_names:
        raise ConfigError(f"tasks: {task}: labels = {list(patterns)} are names, but this objective's labels have none")
    if corpus.several:
        raise ConfigError(
            f"tasks: {task}: labels = {list(patterns)} choose texts by their one label; those of {corpus.name} have"
            " several, give each task data of its own"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in corpus.label_names):
            shown = ", ".join(corpus.label_names[:8])
            raise ConfigError(f"tasks: {task}: {pattern!r} matches no label; {corpus.name} has {shown}, …")
    kept = [i for i, name in enumerate(corpus.label_names) if any(fnmatchcase(name, p) for p in patterns)]
    positions = np.flatnonzero(np.isin(corpus.labels, kept))
    test = int((positions >= len(corpus) - corpus.test).sum())
    taken = corpus.take(positions, test)
    renumbered = np.searchsorted(kept, taken.labels)
    return replace(taken, labels=renumbered, label_names=tuple(corpus.label_names[i] for i in kept))


def shifted(shards: Shards, by: int) -> Shards:
    """The same shards in a corpus where they begin ``by`` positions later."""
    train, local = ({c: p + by for c, p in half.items()} for half in (shards.train, shards.local_test))
    return Shards(train, local, shards.test + by, shards.names)


def _union(parts: Sequence[np.ndarray]) -> np.ndarray:
    joined: np.ndarray = np.sort(np.concatenate(parts))
    return joined
