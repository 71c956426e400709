"""Runs configurations of one tree, in one process: requests on stdin, answers on stdout, one JSON object per line each.

``worker.py TREE``, with TREE first on PYTHONPATH. Only the project's public surface is used: ``fedlab.simulate``,
``fedlab.resume``, ``fedlab.RunConfig.parse``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from lighter import make_lighter

RENAMED = {"run.cache_prefix": "run.cache_hidden_states"}  # keys by their names of before → of now


def parsed(text: str, settings: list[str]) -> Any:
    """The configuration; where this checkout knows a key by its newer name, by that."""
    import fedlab

    try:
        return fedlab.RunConfig.parse(text, settings)
    except fedlab.ConfigError as error:
        old = next((key for key in RENAMED if key in str(error)), None)
        if old is None:
            raise
        return fedlab.RunConfig.parse(text, [setting.replace(old, RENAMED[old]) for setting in settings])


def main(tree: Path) -> None:
    """Answer requests until stdin ends. What libraries print goes to stderr."""
    make_lighter()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line), tree)) + "\n")
        answers.flush()


def answer(request: dict[str, Any], tree: Path) -> dict[str, Any]:
    """What became of one request: its CPU seconds, and why it failed if it did."""
    started, error = time.process_time(), ""
    try:
        perform(request)
        if strays := foreign_modules(tree):
            error = f"modules from elsewhere: {', '.join(strays[:3])}"
    except Exception as caught:
        traceback.print_exc()
        error = f"{type(caught).__name__}: {str(caught).splitlines()[0] if str(caught) else ''}"
    return {"seconds": time.process_time() - started, "error": error}


def perform(request: dict[str, Any]) -> None:
    """Run or resume, quietly."""
    import fedlab

    out = Path(request["out"])
    if request["do"] == "resume":
        fedlab.resume(out, quiet=True)
    else:
        config = parsed(request["toml"], request["settings"])
        fedlab.simulate(config, out, quiet=True)


def foreign_modules(tree: Path) -> list[str]:
    """Files of loaded modules that are neither the tree's nor the environment's: another checkout got in."""
    roots = (tree, Path(__file__).parent, Path(sys.prefix), Path(sys.base_prefix))
    places = tuple(f"{root.resolve()}{os.sep}" for root in roots)
    files = {file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    return sorted(
        file for file in files if Path(file).is_absolute() and not str(Path(file).resolve()).startswith(places)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
