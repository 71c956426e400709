"""Where the simulated owners of a run keep what a real one would keep at home."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedlab.config import RunConfig
from fedlab.data.sources import identity

LOG = "log.txt"  # of a run; in a simulation its clients write to it too


@dataclass(frozen=True)
class Places:
    """Directories of one owner, or of all that share a disk; what is an owner's own lies under its name in them."""

    ledgers: Path  # ledgers, and the keys that sign them
    personal: Path  # what a client keeps of a model between the rounds of a run
    store: Path  # what came once and is named by its hash; one-time keys
    log: Path  # a text file: why it failed or refused, in words that stay with it


def simulated_places(config: RunConfig, run_path: Path) -> Places:
    """The places of a simulation in its run directory."""
    return Places(ledger_directory(config, run_path), run_path / "personal", run_path / "bases", run_path / LOG)


def ledger_directory(config: RunConfig, run_path: Path) -> Path:
    """Where simulated clients keep their ledgers: in the run directory, or below ``privacy.ledger``, one directory per
    data source.
    """
    if config.privacy.ledger is None:
        return run_path / "ledger"
    source = identity(config.data)
    name = f"{config.data.source}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return Path(config.privacy.ledger).absolute() / name
