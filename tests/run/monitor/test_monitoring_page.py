"""docs/monitoring.md: its tables are the code's, its examples name figures that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fedlab.protocol.failures import SENTENCES
from fedlab.run.monitor.endpoints import STATUSES
from fedlab.run.monitor.metrics import CLIENT, RUN, SERVER, Figures, Metric

PAGE = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text(encoding="utf-8")
ALL = (*RUN, *SERVER, *CLIENT)


def row(metric: Metric) -> str:
    label = f"`{metric.label}`" if metric.label else ""
    return f"| `{metric.name}` | {metric.kind} | {label} | {metric.meaning} | {metric.reveals} |"


@pytest.mark.parametrize("metrics", [RUN, SERVER, CLIENT], ids=["run", "server", "client"])
def test_the_tables_are_the_codes(metrics: tuple[Metric, ...]):
    table = "\n".join(map(row, metrics)) + "\n\n"
    assert table in PAGE, f"docs/monitoring.md should have\n{table}"


def test_every_status_is_explained():
    assert [status for status in STATUSES if f"`{status}`" not in PAGE] == []


def rules() -> list[dict[str, Any]]:
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
    return [rule for block in blocks for group in block.get("groups", ()) for rule in group["rules"]]


def test_the_examples_name_what_there_is():
    names = {metric.name: metric for metric in ALL}
    assert len(rules()) >= 12
    for rule in rules():
        used = re.findall(r"fedlab_\w+(?:\{(\w+)=~?\"([^\"]+)\"\})?", rule["expr"])
        found = re.findall(r"fedlab_\w+", rule["expr"])
        assert set(found) <= names.keys(), rule
        for name, (label, values) in zip(found, used, strict=True):
            assert label in ("", names[name].label), rule
            known = {"status": STATUSES, "code": tuple(SENTENCES), "result": ("passed", "refused")}.get(label, ("",))
            assert set(values.split("|")) <= set(known), rule


def test_names_are_such_as_prometheus_wants():
    assert len({metric.name for metric in ALL}) == len(ALL)
    for metric in ALL:
        assert re.fullmatch(r"fedlab_(run|server|client)(_[a-z]+)+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert not metric.meaning.endswith("."), metric.name


def test_a_registry_of_all_gives_text_that_a_parser_reads():
    values = {m.key: {"a": 1, "b": 2.5} if m.label else True for m in ALL}
    registry = CollectorRegistry()
    for metrics in (RUN, SERVER, CLIENT):
        registry.register(Figures(metrics, lambda: values))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len(families) == len(ALL)
    assert {sample.name for family in families for sample in family.samples} == {metric.name for metric in ALL}
