"""Who holds what in a run, held against earlier runs of the same ledger (``fedlab.privacy.ledger.records``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlab.config import RunConfig
from fedlab.data.duplicates import text_digests
from fedlab.data.opening import corpus_and_shards, task_data
from fedlab.privacy.ledger.records import Deal, Holdings, check_deal, record_deal
from fedlab.run.places import ledger_directory


def check_deals(config: RunConfig, run_path: Path) -> None:
    """Raise PrivacyError if records would be charged to other clients than in earlier runs of the same ledger."""
    if _shared(config):
        check_deal(ledger_directory(config, run_path), _deal(config))


def record_deals(config: RunConfig, run_path: Path) -> None:
    """Keep it beside the ledgers, before anything is charged. Raises as ``check_deals``."""
    if _shared(config):
        record_deal(ledger_directory(config, run_path), _deal(config))


def _shared(config: RunConfig) -> bool:
    """Whether clients' ledgers outlive the run. The server's own ledger sees every client, whoever holds what."""
    return config.privacy.unit == "example" and config.privacy.ledger is not None


def _deal(config: RunConfig) -> Deal:
    if config.tasks and config.stage is None:
        corpus, tasks = task_data(config)
        dealt = [shards.train for shards in tasks.shards]
    else:
        corpus, shards = corpus_and_shards(config)
        dealt = [shards.train]

    def hashed(salt: bytes) -> Sequence[Holdings]:
        return [{c: text_digests(corpus, own, salt) for c, own in held.items()} for held in dealt]

    return Deal(hashed, str(config.data.path or config.data.source), config.data_seed)
