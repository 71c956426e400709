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
        config = fedlab.RunConfig.parse(request["toml"], request["settings"])
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
