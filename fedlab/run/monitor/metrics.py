"""The figures themselves: name, type, meaning, and what each reveals. ``docs/monitoring.md`` holds the same tables.

A figure is made when it is asked for, from plain values; what is not known is left out rather than shown as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class Metric:
    """One figure.

    Args:
        name: as Prometheus knows it; a counter's ends in ``_total``.
        key: of the values that it is made from: a number or a bool, or with ``label`` one for each value of the label.
        meaning: in one sentence, without its full stop.
        reveals: what who reads it learns of the data or of people.
        kind: a counter begins at 0 with its process and only grows.
        label: the name of its one label.
    """

    name: str
    key: str
    meaning: str
    reveals: str = "nothing of any record"
    kind: Literal["gauge", "counter"] = "gauge"
    label: str | None = None

    def family(self, values: Mapping[str, Any]) -> GaugeMetricFamily | CounterMetricFamily | None:
        """What Prometheus gets of it; None where its value is not known."""
        value = values.get(self.key)
        if value is None:
            return None
        make = GaugeMetricFamily if self.kind == "gauge" else CounterMetricFamily
        family = make(self.name.removesuffix("_total"), self.meaning, labels=[self.label] if self.label else [])
        for name, one in value.items() if self.label else [(None, value)]:
            family.add_metric([] if name is None else [str(name)], float(one))
        return family


class Figures(Collector):
    """Figures for a registry.

    Args:
        metrics: which.
        values: gives key → value, whenever they are asked for; a key that is not there has no figure.
    """

    def __init__(self, metrics: Iterable[Metric], values: Callable[[], Mapping[str, Any]]) -> None:
        self._metrics, self._values = tuple(metrics), values

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        values = self._values()
        families = (metric.family(values) for metric in self._metrics)
        return [family for family in families if family is not None]


PUBLIC = "nothing: the run's configuration says it"
COUNTS = "who takes part: how many, never which"

RUN = (
    Metric("fedlab_run_info", "run", "1 for the run that the other figures are of", PUBLIC, label="run"),
    Metric("fedlab_run_status", "status", "1 for the run's state, 0 for the others", label="status"),
    Metric("fedlab_run_round", "round", "last complete round"),
    Metric("fedlab_run_rounds_planned", "rounds_planned", "rounds that the run is to have", PUBLIC),
    Metric("fedlab_run_nodes_live", "nodes_live", "nodes that were connected when the round began", COUNTS),
    Metric("fedlab_run_clients_asked", "asked", "clients that were asked to train in the newest round", COUNTS),
    Metric("fedlab_run_clients_used", "used", "clients whose update is in the last complete round", COUNTS),
    Metric("fedlab_run_clients_excluded", "excluded", "clients that the last complete round left out", COUNTS),
    Metric(
        "fedlab_run_exclusions_total",
        "exclusions",
        'updates that were left out, by code; "other": no reply, or an update that cannot be used',
        "how many clients failed or refused, and why, in words of a closed list",
        "counter",
        "code",
    ),
    Metric(
        "fedlab_run_bytes_total",
        "bytes",
        "bytes of states sent to clients (down) and of their updates (up)",
        "sizes of tensors, which the configuration says, times clients",
        "counter",
        "direction",
    ),
    Metric(
        "fedlab_run_seconds_total",
        "seconds",
        "seconds of the complete rounds, by phase; overhead: all but training and evaluation",
        "how long clients trained, together: timing is public in every run (PRIVACY.md)",
        "counter",
        "phase",
    ),
    Metric(
        "fedlab_run_round_seconds",
        "round_seconds",
        "seconds of the last complete round, by phase",
        "as fedlab_run_seconds_total, of one round",
        label="phase",
    ),
    Metric(
        "fedlab_run_epsilon_max",
        "epsilon",
        "ε of the client that spent most, over all in its ledger; not there without DP",
        "what was spent, of which client is not said; it follows from counts of rounds, not from records",
    ),
    Metric(
        "fedlab_run_events_total",
        "events",
        "warnings and errors of the run's log, by level; their text is in metrics.jsonl",
        "that something was said, not what",
        "counter",
        "level",
    ),
    Metric("fedlab_run_round_started_timestamp_seconds", "round_started", "when the newest round began", COUNTS),
    Metric("fedlab_run_updated_timestamp_seconds", "updated", "when the run last said anything"),
)

SERVER = (
    Metric("fedlab_server_ready", "ready", "1 if clients can join and a run can be started"),
    Metric("fedlab_server_nodes_live", "nodes_live", "nodes that are connected now", COUNTS),
    Metric("fedlab_server_nodes_registered", "nodes_registered", "node keys that are let in", COUNTS),
    Metric(
        "fedlab_server_restarts_total",
        "restarts",
        "restarts of a process after it died",
        kind="counter",
        label="process",
    ),
    Metric(
        "fedlab_server_requests_total",
        "requests",
        "requests of nodes at the front, passed on or refused",
        "that somebody is there, and how busy",
        "counter",
        "result",
    ),
    Metric(
        "fedlab_server_bytes_total",
        "bytes",
        "bytes of bodies that the front passed on",
        "sizes of messages, which whoever sees the line sees too",
        "counter",
        "direction",
    ),
    Metric(
        "fedlab_server_certificate_expires_timestamp_seconds",
        "certificate_expires",
        "until when the server's certificate is valid",
        "nothing: the certificate says it to everybody who connects",
    ),
)

CLIENT = (
    Metric("fedlab_client_up", "up", "1 while the resident trainer runs"),
    Metric("fedlab_client_ready", "ready", "1 if it would answer a request now"),
    Metric("fedlab_client_budget_epsilon", "budget", "ε that may be spent of these data in all", PUBLIC),
    Metric(
        "fedlab_client_spent_epsilon",
        "spent",
        "ε of everything in the ledger, as the budget counts it",
        "what was spent; it follows from counts of rounds, not from records",
    ),
    Metric("fedlab_client_left_epsilon", "left", "budget minus spent, at least 0", "as fedlab_client_spent_epsilon"),
    Metric(
        "fedlab_client_requests_total",
        "requests",
        "requests that were answered, by kind, refusals among them",
        kind="counter",
        label="kind",
    ),
    Metric(
        "fedlab_client_rounds_answered_total",
        "rounds_answered",
        "rounds of training that an update was given for",
        kind="counter",
    ),
    Metric(
        "fedlab_client_refusals_total",
        "refusals",
        "requests that nothing was given for, by code",
        "why, in words of a closed list: labels, memory and diverged say that of the data",
        "counter",
        "code",
    ),
    Metric(
        "fedlab_client_request_seconds",
        "request_seconds",
        "seconds of the last request, by kind",
        "roughly how many records a batch had and how long they were: not for other eyes than the owner's",
        label="kind",
    ),
    Metric("fedlab_client_last_request_timestamp_seconds", "last_request", "when the last request was answered"),
    Metric(
        "fedlab_client_restarts_total",
        "restarts",
        "restarts of a process after it died",
        kind="counter",
        label="process",
    ),
)
