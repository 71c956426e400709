"""A run's data before it starts: checked, reported in ``data.json``, and compared with it when the run is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedlab.config import RunConfig
from fedlab.data.canaries import check_secrets
from fedlab.data.checks import check_labels, check_lengths, check_positions, check_said
from fedlab.data.collate import Tokens, tokenise
from fedlab.data.corpus import Corpus
from fedlab.data.duplicates import find_duplicates, text_keys
from fedlab.data.opening import corpus_and_shards, forget_changed, objective_of, secrets_of, task_data
from fedlab.data.partition import Shards
from fedlab.data.report import DataReport, clients_of, content_digest, deal_digest, examples_of
from fedlab.errors import ConfigError
from fedlab.evaluate.choice import check_choices
from fedlab.files import replacing
from fedlab.models.loading import load_tokenizer
from fedlab.models.positions import position_limit
from fedlab.objectives.language import LanguageModel
from fedlab.session import open_session

DATA = "data.json"


def refresh(config: RunConfig) -> None:
    """Forget what this process read of files that were changed since."""
    if forget_changed(config):
        _reports.clear()
        open_session.cache_clear()


def check_data(config: RunConfig) -> DataReport:
    """The data report of a run. Raises ConfigError for labels and lengths that cannot work, named by their key."""
    check_positions(config.data.max_length, position_limit(config.model), config.model.name)
    if config.evaluate.choices:
        check_choices(config, objective_of(config), load_tokenizer(config.model))
    tasks = [(task.name, task.labels, task.data) for task in config.tasks]
    seen = config.data, config.data_seed, config.model, config.objective, tasks, config.stream.heads
    if (key := repr(seen)) not in _reports:
        _reports.clear()
        _reports[key] = _report(config)
    return _reports[key]


_reports: dict[str, DataReport] = {}  # the last one, by all that it depends on


def _report(config: RunConfig) -> DataReport:
    if config.tasks:
        corpus, data = task_data(config)
        tasks = list(data.shards)
    else:
        corpus, shards = corpus_and_shards(config)
        tasks = [shards]
    warnings = list(corpus.reading.warnings) if corpus.reading else []
    for one in tasks:
        warnings += [text for text in check_labels(corpus, one) if text not in warnings]
    objective, tokenizer = objective_of(config), load_tokenizer(config.model)
    tokens = tokenise(corpus, tokenizer, config.data.max_length, objective)
    lengths = tokens.lengths(np.arange(len(corpus)))
    check_lengths(corpus, lengths, config.model.name)
    if isinstance(objective, LanguageModel):
        warnings += check_said(corpus, tokens.label_counts(), config.model.name)
    secrets = secrets_of(config)
    inserted = 0 if secrets is None else len(corpus) - secrets.first
    if secrets is not None:
        space = tokenise(secrets.records, tokenizer, config.data.max_length, objective)
        check_secrets(secrets, space, config.data.max_length)
    twice = find_duplicates(corpus, _together(tasks), _purged(config, corpus, tasks))
    return DataReport(
        corpus.reading,
        examples_of(corpus, tasks),
        clients_of(corpus, tasks),
        len(corpus.label_names),
        twice,
        _cut(corpus, tokens, config, objective, tokenizer),
        config.data.max_length,
        warnings,
        content_digest(corpus),
        deal_digest(tasks),
        inserted,
    )


def _together(tasks: list[Shards]) -> Shards:
    """All tasks as one: what a client trains on in any of them."""
    if len(tasks) == 1:
        return tasks[0]
    return Shards(
        {c: np.unique(np.concatenate([one.train[c] for one in tasks])) for c in tasks[0].train},
        {c: np.unique(np.concatenate([one.local_test[c] for one in tasks])) for c in tasks[0].train},
        np.unique(np.concatenate([one.test for one in tasks])),
    )


def _purged(config: RunConfig, corpus: Corpus, tasks: list[Shards]) -> int:
    """Examples that are neither trained on nor held out any more: those that ``data.duplicates`` purged."""
    if config.data.duplicates != "purge" and not any("duplicates" in task.data for task in config.tasks):
        return 0
    there = [part for one in tasks for part in (*one.train.values(), *one.local_test.values(), one.test)]
    trained = np.concatenate([own for one in tasks for own in one.train.values()])
    keys, gone = text_keys(corpus), np.setdiff1d(np.arange(len(corpus)), np.concatenate(there))
    return int(np.isin(keys[gone], keys[trained]).sum())


def _cut(corpus: Corpus, tokens: Tokens, config: RunConfig, objective: Any, tokenizer: Any) -> int:
    """Texts, or their answers, that are longer than ``data.max_length`` tokens: that would have one token more."""
    limit, rows = config.data.max_length, np.arange(len(corpus))
    full = np.flatnonzero(np.maximum(tokens.lengths(rows), tokens.label_lengths(rows)) >= limit)
    if not len(full):
        return 0
    part = corpus.take(full, 0)
    encoded = objective.encode(part.texts, part.pairs, part.labels, tokenizer, limit + 1)
    longest = [map(len, encoded[name]) for name in ("input_ids", "labels") if name in encoded]
    return sum(max(both) > limit for both in zip(*longest, strict=True))


def record_data(path: Path, config: RunConfig) -> DataReport:
    """Write ``data.json`` into a run directory that has none, for its owner's eyes; else compare.

    Raises ConfigError as ``check_data`` and ``check_unchanged``.
    """
    report = check_data(config)
    if (path / DATA).is_file():
        check_unchanged(path, config)
        return report
    with replacing(path / DATA) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


def check_unchanged(path: Path, config: RunConfig) -> None:
    """Raise ConfigError unless the data are what they were when the run began: its files, what was read of them, and
    who holds what.
    """
    if not (path / DATA).is_file():
        if any(path.glob("checkpoints/*")):
            raise ConfigError(f"{str(path)!r} has no {DATA}, so nobody can say that its data are what they were")
        return
    try:
        before = json.loads((path / DATA).read_text(encoding="utf-8"))
        files, content, deal = before["files"], before["content"], before["deal"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{str(path / DATA)!r} is damaged: nobody can say that the data are what they were") from None
    fix = "put back what was there, or start a new run"
    report = check_data(config)
    now = {file.path: file for file in report.reading.files} if report.reading else {}
    for file in files:
        if file["path"] not in now or now[file["path"]].sha256 != file["sha256"]:
            raise ConfigError(f"data: {file['path']!r} is not what it was when this run began; {fix}")
    if odd := sorted(now.keys() - {file["path"] for file in files}):
        raise ConfigError(f"data: {odd[0]!r} was not there when this run began; {fix}")
    if report.content != content:
        raise ConfigError(f"data: texts or labels are not what they were when this run began; {fix}")
    if report.deal != deal:
        raise ConfigError(f"data: clients hold other examples than when this run began; {fix}")
