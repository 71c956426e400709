"""``report.html`` of a stream: the matrix of scores as a heat map, the metrics, and a link to each task's own report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fedlab.errors import ConfigError
from fedlab.privacy.promise import shown_epsilon
from fedlab.report.plots import heat_map
from fedlab.run.directory import RunDirectory

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ name }} – fedlab</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } table { border-collapse: collapse }
th, td { padding: .2rem .8rem .2rem 0; text-align: left } svg { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto }
</style></head><body>
<h1>{{ name }}: {{ result.strategy }}, {{ result.tasks | length }} tasks</h1>
{% if result.warnings %}<h2>Warnings</h2><ul>{% for text in result.warnings %}<li>{{ text }}</li>{% endfor %}</ul>{% endif %}
{{ figure | safe }}
<table>{% for key, value in facts %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Tasks</h2><ul>{% for folder in folders %}<li><a href="{{ folder }}/report.html">{{ folder }}</a></li>{% endfor %}</ul>
<h2>Configuration</h2><pre>{{ toml }}</pre></body></html>
"""
FACTS = {
    "average_score": "average score after the last task",
    "learning_score": "learning score (each task just after it)",
    "backward_transfer": "backward transfer (negative: forgetting)",
    "forgetting": "forgetting",
    "forward_transfer": "forward transfer",
    "worst_tenth": "worst tenth of the clients, mean over tasks",
    "leak": "largest share of a change inside what was protected",
    "epsilon": "ε over the whole stream",
    "bytes_up": "bytes up",
    "bytes_down": "bytes down, bases included",
    "seconds": "seconds",
}


def write_stream_report(path: Path) -> Path:
    """Write ``report.html`` beside a stream's ``result.json`` and return its path."""
    directory = RunDirectory.open(path)
    result: dict[str, Any] = directory.result or {}
    if "matrix" not in result:
        raise ConfigError(f"{str(path)!r} has no finished result to report on; fedlab resume goes on with it")
    directory.write_text("report.html", render_stream_report(path, result))
    return path / "report.html"


def render_stream_report(path: Path, result: dict[str, Any]) -> str:
    """The page: the same bytes for the same files and ``result``, which is what ``result.json`` holds."""
    config = RunDirectory.open(path).config
    matrix = [[math.nan if value is None else value for value in row] for row in result["matrix"]]
    rows = result["tasks"][: len(matrix)] if not result["joint"] else ["all"]
    shown = {key: _shown(result[key]) for key in FACTS if result.get(key) is not None}
    shown["epsilon"] = shown_epsilon(result["epsilon"], 4)
    facts = [(label, shown[key]) for key, label in FACTS.items() if key in shown]
    return (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            name=config.run.name,
            result=result,
            figure=heat_map(
                f"{result['primary']} on each task (columns) after each task (rows)", matrix, rows, result["tasks"]
            ),
            facts=facts,
            folders=sorted(p.parent.name for p in path.glob("*/report.html")),
            toml=config.to_toml(),
        )
    )


def _shown(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1e-3
        else f"{value:.4f}"
        if isinstance(value, float)
        else str(value)
    )
