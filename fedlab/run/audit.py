"""``fedlab audit``: print what an audit found, and leave an empirical one beside the run that it belongs to."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.run.directory import RunDirectory, jsonable


def audit_directory(path: Path, keys: Path | None, as_json: bool) -> bool:
    """Audit a run, or every task of a stream, from its files alone; True if something is wrong."""
    from fedlab.privacy.audit.render import render
    from fedlab.privacy.audit.run import audit_run, load_keys

    stream = _is_stream(path / "run.toml")
    parts = [folder.parent for folder in sorted(path.glob("*/run.toml"))] if stream else [path]
    if not parts:
        raise ConfigError(f"{str(path)!r} is a stream of which no task has begun; there is nothing to audit")
    found = {part.name: audit_run(part, load_keys(keys) if keys else None) for part in parts}
    if as_json:
        shown = {name: one.to_dict() for name, one in found.items()}
        print(json.dumps(shown if stream else shown[path.name], indent=2, allow_nan=False))
    else:
        print("\n\n".join((f"{name}\n" if stream else "") + render(one) for name, one in found.items()))
    return any(one.findings for one in found.values())


def _is_stream(file: Path) -> bool:
    """Whether a run.toml is that of a chain of runs. Whatever else is wrong with it, the audit itself will say."""
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(tree.get("tasks")) and "stage" not in tree


def audit_trainer(
    config: Path, overrides: Sequence[str], canaries: int, seed: int, production: bool, as_json: bool
) -> bool:
    """Audit the trainer of a configuration; True if something is wrong.

    For the ``run.toml`` of a run, its directory keeps the result.
    """
    from fedlab.privacy.statement import EMPIRICAL, write_statement
    from fedlab.run.launch import check
    from fedlab.trainer_audit.empirical import empirical_audit, render

    loaded = RunConfig.load(config, list(overrides))
    check(loaded)
    found = empirical_audit(loaded, canaries, seed, production)
    print(json.dumps(jsonable(found.to_dict()), indent=2, allow_nan=False) if as_json else render(found))
    if config.name == "run.toml" and (config.parent / "environment.json").is_file() and not overrides:
        directory = RunDirectory.open(config.parent)
        directory.write_json(EMPIRICAL, found.to_dict())
        if (result := directory.result) is not None and "clients" in result:
            write_statement(directory.path, result["clients"])
    return bool(found.findings)
