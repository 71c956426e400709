"""``fedlab audit``: print what an audit found, and leave an empirical one beside the run that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedlab.config import RunConfig
from fedlab.run.directory import RunDirectory, jsonable


def audit_directory(path: Path, keys: Path | None, as_json: bool) -> bool:
    """Audit a run from its files alone; True if something is wrong."""
    from fedlab.privacy.audit.run import audit_run, load_keys, render

    found = audit_run(path, load_keys(keys) if keys else None)
    print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else render(found))
    return bool(found.findings)


def audit_trainer(config: Path, overrides: Sequence[str], canaries: int, seed: int, production: bool, as_json: bool) -> bool:
    """Audit the trainer of a configuration; True if something is wrong. For the ``run.toml`` of a run, its directory keeps the result."""
    from fedlab.privacy.statement import EMPIRICAL, write_statement
    from fedlab.run.launch import check
    from fedlab.train.audit import empirical_audit, render

    loaded = RunConfig.load(config, list(overrides))
    check(loaded)
    found = empirical_audit(loaded, canaries, seed, production)
    print(json.dumps(jsonable(found.to_dict()), indent=2, allow_nan=False) if as_json else render(found))
    if config.name == "run.toml" and (config.parent / "environment.json").is_file() and not overrides:
        directory = RunDirectory.open(config.parent)
        directory.write_json(EMPIRICAL, found.to_dict())
        if (result := directory.result) is not None and "clients" in result:
            write_statement(directory.path, list(result["clients"]))
    return bool(found.findings)
