"""From a configuration to its data: the corpus, who holds what of it, and the tokens. Each is read once per process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedlab.config import RunConfig
from fedlab.config.data import DEFAULT_CLIENTS, DataSection
from fedlab.config.tasks import TaskSection
from fedlab.data.cache import cached_arrays
from fedlab.data.canaries import Secrets, with_canaries
from fedlab.data.collate import tokenise
from fedlab.data.corpus import Corpus, renumbered
from fedlab.data.duplicates import purge
from fedlab.data.federated import FederatedData
from fedlab.data.partition import Shards, assign, assign_all
from fedlab.data.sources import SOURCES, load_corpus
from fedlab.data.tasks import TaskData, check_same_clients, joined, label_space, shifted
from fedlab.errors import LabelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedlab.objectives.base import Objective

FORMAT = 2  # raise when the meaning of cached shards changes


def open_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, objective: Objective) -> FederatedData:
    """The run's data, tokenised (from the cache on disk if another run did it before)."""
    corpus, shards = corpus_and_shards(config)
    tasks = task_data(config)[1] if config.tasks else None
    return FederatedData(tokenise(corpus, tokenizer, config.data.max_length, objective), shards, tasks=tasks)


@dataclass(frozen=True)
class OwnRecords:
    """The records of one client alone, from a place of its own, under the labels that the run names."""

    corpus: Corpus
    shards: Shards
    tasks: TaskData | None = None  # of a stream

    @property
    def groups(self) -> tuple[int, ...]:
        """Label → task, where tasks have heads of their own; else ()."""
        groups = self.tasks.groups if self.tasks is not None else None
        return () if groups is None else tuple(groups.tolist())

    def tokenised(self, tokenizer: PreTrainedTokenizerBase, max_length: int, objective: Objective) -> FederatedData:
        """As training reads them."""
        return FederatedData(tokenise(self.corpus, tokenizer, max_length, objective), self.shards, tasks=self.tasks)


def own_records(data: DataSection, client: str, config: RunConfig) -> OwnRecords:
    """Read the records of one client.

    All are the one client's; what is held out is what a simulation would hold out of the same records, in the same
    order, for a client of this name.

    Args:
        data: where they are, as the client's own file says.
        client: whose they are.
        config: of the run; of its [data] nothing is read.

    Raises:
        LabelError: it has a label that the run does not name, or, in a stream, lacks one.
        ConfigError: the records cannot be read, or do not suffice.
    """
    seed = data.seed or 0
    if config.tasks:
        parts = [load_corpus(data, seed, task.labels, task.name, config.objective.name) for task in config.tasks]
        shards = [assign_all(part, data, client, seed) for part in parts]
        names = [task.name for task in config.tasks]
        corpus, tasks = _joined(parts, names, shards, config.stream.heads == "shared", data.duplicates == "purge")
        _check_agreed(corpus, config)
        task, stream = config.stage.task if config.stage else 0, config.stream
        return OwnRecords(corpus, tasks.training(task, stream.replay, stream.joint, config.run.seed), tasks)
    corpus = labelled_corpus(data, config)
    own = assign_all(corpus, data, client, seed)
    return OwnRecords(corpus, purge(corpus, [own])[0] if data.duplicates == "purge" else own)


def labelled_corpus(data: DataSection, config: RunConfig) -> Corpus:
    """The records of a place, under the labels that the run names. Raises LabelError, ConfigError."""
    return _agreed(load_corpus(data, data.seed or 0, objective=config.objective.name), config)


def objective_of(config: RunConfig) -> Objective:
    """The run's objective over the labels of its corpus."""
    from fedlab.objectives import objective_class  # here: torch comes with it

    groups = task_data(config)[1].groups if config.tasks else None
    names = corpus_and_shards(config)[0].label_names
    told = () if groups is None else tuple(groups.tolist())
    return objective_class(config.objective.name).of(config.objective, names, told)


def corpus_and_shards(config: RunConfig) -> tuple[Corpus, Shards]:
    """Corpus and partition of a run, of a stream's task if it is one; needs no tokenizer."""
    if not config.tasks:
        corpus, shards, _ = _untasked(config)
        return _agreed(corpus, config), shards
    corpus, tasks = task_data(config)
    task = config.stage.task if config.stage else 0
    return corpus, tasks.training(task, config.stream.replay, config.stream.joint, config.run.seed)


def secrets_of(config: RunConfig) -> Secrets | None:
    """The made-up secrets among the training records; None without ``data.canaries``."""
    return _untasked(config)[2] if config.data.canaries is not None else None


def _untasked(config: RunConfig) -> tuple[Corpus, Shards, Secrets | None]:
    return _corpus_and_shards(config.data.model_dump_json(), config.data_seed, config.objective.name)


def task_data(config: RunConfig) -> tuple[Corpus, TaskData]:
    """The one corpus of a stream and who holds what of each task."""
    tasks = tuple((task.name, task.labels, section_of(config.data, task).model_dump_json()) for task in config.tasks)
    corpus, data = _task_data(tasks, config.stream.heads == "shared", config.data_seed, config.objective.name)
    _check_agreed(corpus, config)
    return corpus, data


def _check_agreed(corpus: Corpus, config: RunConfig) -> None:
    """Which task a label is of depends on all of them."""
    agreed = config.objective.labels
    if agreed and corpus.label_names != agreed:
        raise LabelError(f"data: the tasks' labels are not those of objective.labels ({len(agreed)} of them)")


def _agreed(corpus: Corpus, config: RunConfig) -> Corpus:
    """The corpus with labels numbered as the run names them; as they are where it names none.

    Raises LabelError for a label that is not among them, ConfigError for labels that cannot be learnt.
    """
    from fedlab.objectives import objective_class  # here: torch comes with it

    corpus = renumbered(corpus, config.objective.labels)
    objective_class(config.objective.name).check_labels(corpus.label_names, corpus.name)
    return corpus


def section_of(data: DataSection, task: TaskSection) -> DataSection:
    """[data] as one task of a stream has it."""
    return DataSection.model_validate({**data.model_dump(), **task.data})


def sections(config: RunConfig) -> list[DataSection]:
    """[data] of a run, or of each of its tasks."""
    return [section_of(config.data, task) for task in config.tasks] or [config.data]


def forget_changed(config: RunConfig) -> bool:
    """Read the data anew at the next call if their files were changed since they were read in this process; says
    whether they were.

    For who starts a run: during one, data stay what they were.
    """
    stamps: dict[str, tuple[int, int, int]] = {}
    for data in sections(config):
        stamps |= stamps_of(data)
    changed = any(_stamps.get(path, stamp) != stamp for path, stamp in stamps.items())
    _stamps.update(stamps)
    if changed:
        _task_data.cache_clear()
        _corpus_and_shards.cache_clear()
    return changed


def stamps_of(data: DataSection) -> dict[str, tuple[int, int, int]]:
    """File → size, time and number, of all that are read: whether they are what they were."""
    found = {}
    for _, path in SOURCES[data.source].files(data):
        if path.exists():
            status = path.stat()
            found[str(path.resolve())] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


_stamps: dict[str, tuple[int, int, int]] = {}  # of the files that this process read, when it began a run


@lru_cache(maxsize=1)
def _task_data(
    tasks: tuple[tuple[str, tuple[str, ...], str], ...], shared: bool, seed: int, objective: str
) -> tuple[Corpus, TaskData]:
    names = [name for name, _, _ in tasks]
    sections = [DataSection.model_validate_json(text) for _, _, text in tasks]
    parts = [
        load_corpus(data, seed, labels, name, objective)
        for (name, labels, _), data in zip(tasks, sections, strict=True)
    ]
    own = [_assigned(part, data, seed) for part, data in zip(parts, sections, strict=True)]
    check_same_clients(names, own)
    return _joined(parts, names, own, shared, any(data.duplicates == "purge" for data in sections))


def _joined(
    parts: Sequence[Corpus], names: Sequence[str], own: Sequence[Shards], shared: bool, purged: bool
) -> tuple[Corpus, TaskData]:
    """One corpus of a stream's tasks, and who holds what of each."""
    space = label_space(parts, names, shared)
    corpus, offsets = joined(parts, space)
    shards = tuple(shifted(one, by) for one, by in zip(own, offsets, strict=True))
    return corpus, TaskData(purge(corpus, shards) if purged else shards, space.groups)


@lru_cache(maxsize=1)
def _corpus_and_shards(data_json: str, seed: int, objective: str) -> tuple[Corpus, Shards, Secrets | None]:
    data = DataSection.model_validate_json(data_json)
    corpus = load_corpus(data, seed, objective=objective)
    shards = _assigned(corpus, data, seed)
    if data.duplicates == "purge":
        shards = purge(corpus, [shards])[0]
    if data.canaries is None:
        return corpus, shards, None
    return with_canaries(corpus, shards, data.canaries, objective, seed)


def _assigned(corpus: Corpus, data: DataSection, seed: int) -> Shards:
    """The partition, from the cache on disk if another process made it."""
    settings = data.model_dump(mode="json", include={"clients", "partition", "min_client_size", "test_fraction"})
    if data.partition.kind != "natural":
        settings["clients"] = data.clients or DEFAULT_CLIENTS
    content = hashlib.sha256(corpus.label_bytes + repr((corpus.natural, corpus.test)).encode()).hexdigest()
    key = {"format": FORMAT, "content": content, "seed": seed, **settings}
    return Shards.from_arrays(cached_arrays("shards", key, lambda: assign(corpus, data, seed).to_arrays()))
