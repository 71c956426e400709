"""Make ``report.html`` from ``result.json``, ``metrics.jsonl``, ``run.toml`` and ``environment.json``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fedlab.errors import ConfigError
from fedlab.privacy import promise
from fedlab.run.directory import RunDirectory
from fedlab.run.samples import read_samples

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{{ name }} – fedlab</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } th, td { padding: .2rem .8rem .2rem 0; text-align: right } th:first-child, td:first-child { text-align: left }
th { border-bottom: 1px solid #999 } .figures { display: flex; flex-wrap: wrap; gap: 1rem } .figures svg { max-width: 100%; height: auto }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem } .facts div { border-left: 3px solid #2563eb; padding-left: .6rem }
.facts b { display: block; font-size: 1.3rem } .said td { text-align: left; vertical-align: top; white-space: pre-wrap; padding-bottom: .8rem } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto } .warn { color: #9a3412 }
</style></head><body>
<h1>{{ name }}: {{ config.strategy.name }} on {{ config.data.source }}</h1>
<p>Status <b>{{ result.status }}</b>{% if result.reason %} – {{ result.reason }}{% endif %}</p>
{% if result.warnings %}<h2>Warnings</h2><ul>{% for text in result.warnings %}<li class="warn">{{ text }}</li>{% endfor %}</ul>{% endif %}
<div class="facts">{% for label, value in facts %}<div>{{ label }}<b>{{ value }}</b></div>{% endfor %}</div>
<h2>Privacy</h2>{% for text in privacy %}<p>{{ text }}</p>{% endfor %}
<h2>Curves</h2><div class="figures">{% for figure in figures %}{{ figure | safe }}{% endfor %}</div>
<h2>Clients</h2><table><tr><th>client</th><th>examples</th><th>rounds</th><th>{{ result.primary }}</th><th>ε</th><th>δ</th></tr>
{% for id, c in result.clients.items() %}<tr><td>{{ id }}</td><td>{{ c.examples }}</td><td>{{ c.participations }}</td><td>{{ number(c.score) }}</td>
<td>{{ epsilon(c.epsilon, 4) }}</td><td>{{ "%.2g" | format(c.delta) if c.delta else "–" }}</td></tr>{% endfor %}</table>
{% if drift %}<h2>General ability</h2><p>Of public text (<code>evaluate.drift</code>: {{ texts }}), which nobody trained on here: perplexity that grows is ability that is lost.</p>
<table><tr><th></th><th>loss (nats per token)</th><th>perplexity</th><th>bits per byte</th></tr>
{% for when, s in drift %}<tr><td>{{ when }}</td><td>{{ number(s.loss) }}</td><td>{{ number(s.perplexity) }}</td><td>{{ number(s.bits_per_byte) }}</td></tr>{% endfor %}</table>{% endif %}
{% if samples %}<h2>Answers to public prompts</h2><table class="said"><tr><th>prompt</th><th>before the first round</th><th>after the last</th></tr>
{% for s in samples %}<tr><td>{{ s.prompt }}</td><td>{{ "–" if s.before is none else s.before }}</td><td>{{ "–" if s.after is none else s.after }}</td></tr>{% endfor %}</table>{% endif %}
{% if notable %}<h2>Notable events</h2><ul>{% for event in notable %}<li class="warn">round {{ event.round }}: {{ event.message }}</li>{% endfor %}</ul>{% endif %}
<h2>Configuration</h2><pre>{{ toml }}</pre><h2>Environment</h2><pre>{{ environment }}</pre>
</body></html>
"""

WHEN = {"before": "before the first round", "after": "after the last"}
UNKNOWN: dict[str, Any] = {  # of a run that ended before its clients were known
    "scores": None, "primary": "score", "client_scores": {"worst": None}, "epsilon": None, "rounds": 0, "clients": {},
    "bytes_up": 0, "bytes_down": 0, "seconds": 0.0, "overhead_seconds_per_round": None,
}  # fmt: skip


def write_report(path: Path) -> Path:
    """Write ``report.html`` into the run directory and return its path. Raises ConfigError if the run has no result yet."""
    directory = RunDirectory.open(path)
    result = directory.result
    if result is None:
        raise ConfigError(f"{str(path)!r} has no result to report on; fedlab resume goes on with it")
    directory.write_text("report.html", render_report(path, result))
    return path / "report.html"


def render_report(path: Path, result: dict[str, Any]) -> str:
    """The page: the same bytes for the same files and ``result``, which is what ``result.json`` holds."""
    from fedlab.report.plots import bar_chart, line_chart

    config, result = RunDirectory.open(path).config, {**UNKNOWN, **result}
    told = path / "metrics.jsonl"
    lines = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()] if told.is_file() else []
    drift = result.get("drift") or {}
    scored, trained = _phase(lines, "evaluate"), _phase(lines, "train")
    figures = []
    if scored:
        rounds = [line["round"] for line in scored]
        for name in scored[-1]["scores"]:
            curve = (rounds, [math.nan if (v := line["scores"][name]) is None else v for line in scored])
            figures.append(line_chart(f"Held-out {name}", {name: curve}, name))
    if trained and isinstance(trained[-1]["epsilon"], float):
        spent = ([t["round"] for t in trained], [t["epsilon"] for t in trained])
        figures.append(line_chart("Privacy spent", {"ε": spent}, "ε of the worst client"))
    scores = {c: info["score"] for c, info in result["clients"].items() if info["score"] is not None}
    spread = result["client_scores"]
    if len(spread.get("curve") or []) > 1:
        figures.append(_curve_over_clients(spread["curve"], spread["worst_decile"], result["primary"]))
    if scores:
        figures.append(bar_chart(f"{result['primary']} per client", list(scores), list(scores.values()), "held-out"))
    return (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            name=config.run.name,
            config=config,
            result=result,
            facts=_facts(result),
            privacy=[
                *(
                    promise.report(config, result["epsilon"], _one_delta(result))
                    if result["clients"]
                    else [promise.UNCOUNTED]
                ),
                *map(promise.plain, promise.memorised(result.get("memorisation"))),
            ],
            epsilon=promise.shown_epsilon,
            drift=[(label, drift[when]) for when, label in WHEN.items() if when in drift],
            texts=_measured(drift),
            samples=read_samples(path),
            figures=figures,
            notable=[line for line in lines if line["phase"] == "event"],
            number=_number,
            toml=config.to_toml(),
            environment=(path / "environment.json").read_text(encoding="utf-8"),
        )
    )


def _phase(lines: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["phase"] == phase]


def _number(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.4f}"


def _one_delta(result: dict[str, Any]) -> float | None:
    """The clients' δ; None if they have different ones."""
    found = {c["delta"] for c in result["clients"].values() if c.get("delta") is not None}
    return found.pop() if len(found) == 1 else None


def _curve_over_clients(curve: list[float], worst_decile: float, name: str) -> str:
    """Figure of the clients' scores, the worst first, beside the mean of the worst tenth."""
    from fedlab.report.plots import line_chart

    shares = [100 * (i + 1) / len(curve) for i in range(len(curve))]
    series = {"clients": (shares, curve), "mean of the worst tenth": ([0.0, 100.0], [worst_decile, worst_decile])}
    return line_chart(f"{name} over clients, the worst first", series, "held-out", "% of the clients")


def _measured(drift: dict[str, dict[str, float]]) -> str:
    """How much public text was measured."""
    return next((f"{one['texts']} texts, {one['tokens']} tokens" for one in drift.values()), "")


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    spread = result["client_scores"]
    return [
        *((name, _number(value)) for name, value in (result["scores"] or {}).items()),
        ("ε (maximum)", promise.shown_epsilon(result["epsilon"], 4)),
        ("worst client", _number(spread["worst"])),
        *([("worst tenth of the clients", _number(spread["worst_decile"]))] if "worst_decile" in spread else []),
        ("rounds", str(result["rounds"])),
        ("MB up / down", f"{result['bytes_up'] / 1e6:.2f} / {result['bytes_down'] / 1e6:.2f}"),
        ("seconds", f"{result['seconds']:.0f}"),
        ("overhead per round", "–" if (over := result["overhead_seconds_per_round"]) is None else f"{over} s"),
    ]
