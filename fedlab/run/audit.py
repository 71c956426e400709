"""``fedlab audit``: print what an audit found, and leave an empirical one beside the run that it belongs to."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

from fedlab.config import RunConfig
from fedlab.run.directory import RunDirectory, jsonable
from fedlab.run.output import say

FAILED, LESS = 3, 5  # exit codes: something is wrong; less can be said than was asked


def audit_directory(path: Path, keys: Path | None, kept: Sequence[Path], as_json: bool) -> int:
    """Audit a run, or a stream and every task of it, from its files alone, and print what was found.

    Returns:
        The exit code: 0 where the verdict is what was asked for (``verified`` if keys or kept ledgers were given, else
        also ``consistent`` or no DP), 5 where it is less, 3 where something is wrong.
    """
    from fedlab.privacy.audit.render import render
    from fedlab.privacy.audit.run import audit_run, load_kept, load_keys
    from fedlab.run.regenerate import regenerate

    published = load_keys(keys) if keys else None
    held = load_kept(kept) if kept else None
    if _is_stream(path):
        from fedlab.run.stream_audit import audit_stream, render_stream

        stream = audit_stream(path, published, held)
        text, found, verdict = render_stream(stream), stream.to_dict(), stream.verdict
    else:
        one = audit_run(path, published, held, regenerate)
        text, found, verdict = render(one), one.to_dict(), one.verdict
    say(json.dumps(found, indent=2, allow_nan=False) if as_json else text)
    if verdict == "failed":
        return FAILED
    asked = ("verified",) if published is not None or held is not None else ("verified", "consistent", "no-dp")
    return 0 if verdict in asked else LESS


def _is_stream(path: Path) -> bool:
    """Whether a directory is that of a chain of runs. Whatever else is wrong with it, the audit itself will say."""
    from fedlab.privacy.audit.files import TEXT, RunFiles, Unreadable

    try:
        data = RunFiles.below(path).read("run.toml", TEXT)
        tree = tomllib.loads((data or b"").decode("utf-8"))
    except (Unreadable, OSError, ValueError, RecursionError):
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

    loaded = check(RunConfig.load(config, list(overrides)))
    found = empirical_audit(loaded, canaries, seed, production)
    say(json.dumps(jsonable(found.to_dict()), indent=2, allow_nan=False) if as_json else render(found))
    if config.name == "run.toml" and (config.parent / "environment.json").is_file() and not overrides:
        directory = RunDirectory.open(config.parent)
        directory.write_json(EMPIRICAL, found.to_dict())
        if (result := directory.result) is not None and "clients" in result:
            write_statement(directory.path, result["clients"], result.get("memorisation"))
    return bool(found.findings)
