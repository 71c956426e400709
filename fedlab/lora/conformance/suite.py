"""Does a LoRA aggregator do what it promises? Published ones often do not, and nothing in a run shows it.

>>> from fedlab.lora import conformance
>>> def fedavg(state, updates, weights, round_number):
...     return {n: v + sum(weights[c] * u[n] for c, u in sorted(updates.items())) for n, v in state.items()}
>>> report = conformance.check(fedavg, promise="mean of products")
>>> report.failed[:3]
['unequal weights', 'uniform weights', 'wide layer']
>>> conformance.check(fedavg, promise="product of means").failed
['NaN and infinity']

An aggregator is ``aggregate(state, updates, weights, round_number) -> state``, or an object that has it as a method.
One that keeps something between rounds is an object with ``init(state) -> server_state`` and ``aggregate(state,
server_state, updates, weights, round) -> (state, server_state)``, see ``fedlab.lora.aggregator``. States are flat (see
``fedlab.lora.state``), ``updates[client]`` is the *change* of each trained tensor, weights sum to 1. It is judged by
the effective weight W + s·(B·A + residual) that comes out, against dense float64 references that share no code with
it. No model, no data, under a second.

Promises, for the local products B_k·A_k and the weights p_k:

========================================  ==========================================================================
mean of products                          Σ p_k B_k·A_k exactly, perhaps with a residual (FFA, FedSVD, FedEx, FLoRA)
product of means                          (Σ p_k B_k)·(Σ p_k A_k) (FedIT, HetLoRA)
best of rank r of the mean of products    its truncated SVD (FlexLoRA)
projected mean of products                its best approximation among all B·(Σ p_k A_k) (LoRA-FAIR)
unchanged                                 B·A as it was (head only)
========================================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from fedlab.lora.aggregator import Aggregator, Round, ServerState, Updates, Weights
from fedlab.lora.conformance import laws, manners, memory
from fedlab.lora.conformance.cases import PROMISES, Aggregate, Finding, Keep, Reweigh, Start, Subject
from fedlab.lora.state import PARTS, RESIDUAL, State, part_of

__all__ = ["PROMISES", "PROPERTIES", "Finding", "Report", "check", "markdown"]

MARKS = {True: "ok", False: "FAILED", None: "–"}
Trains = Collection[str] | Callable[[int], Collection[str]]

PROPERTIES: dict[str, Callable[[Subject], Finding]] = {
    "unequal weights": laws.unequal_weights,
    "uniform weights": laws.uniform_weights,
    "wide layer": laws.wide_layer,
    "tall layer": laws.tall_layer,
    "square layer": laws.square_layer,
    "scale": laws.scale,
    "head": laws.head,
    "frozen tensors": manners.frozen_tensors,
    "one client": laws.one_client,
    "order of replies": manners.order_of_replies,
    "nothing in place": memory.nothing_in_place,
    "same call twice": memory.same_call_twice,
    "save, load, go on": memory.save_load_go_on,
    "partial participation": laws.partial_participation,
    "zero change": laws.zero_change,
    "opposite clients": laws.opposite_clients,
    "zero or deficient B": laws.zero_and_deficient,
    "shapes and dtype": manners.shapes_and_dtype,
    "bfloat16 values": laws.bfloat16_values,
    "several rounds": laws.several_rounds,
    "NaN and infinity": manners.nan_and_infinity,
    "client isolation": manners.client_isolation,
    "unequal ranks": laws.unequal_ranks,
}


@dataclass(frozen=True)
class Report:
    """Every property and what it came to; ``print`` it."""

    title: str
    promise: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> list[str]:
        """Names of the properties that do not hold."""
        return [finding.name for finding in self.findings if finding.ok is False]

    def require(self) -> None:
        """Raise AssertionError naming every property that failed."""
        if self.failed:
            lines = "\n".join(f"  {finding.name}: {finding.text}" for finding in self.findings if finding.ok is False)
            raise AssertionError(f"{self.title} fails {len(self.failed)} of {len(self.findings)} properties\n{lines}")

    def __getitem__(self, name: str) -> Finding:
        return {finding.name: finding for finding in self.findings}[name]

    def __str__(self) -> str:
        rows = [("property", "", "measured"), *((f.name, MARKS[f.ok], f.text) for f in self.findings)]
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(
            [f"{self.title}: {self.promise}", *(f"  {name:{width}}  {mark:6}  {text}" for name, mark, text in rows)]
        )


def check(
    aggregate: Any,
    *,
    promise: str,
    trains: Trains | None = None,
    ranks: str | bool = False,
    start: Start | None = None,
    personal: Collection[str] = (),
    keep: Keep | None = None,
    rewrites: Collection[str] = (),
    at_scale: Callable[[float], Any] | None = None,
    fresh: Callable[[], Any] | None = None,
    reweigh: Reweigh | None = None,
    refuses: type[Exception] | tuple[type[Exception], ...] = ValueError,
    tolerance: float = 1e-5,
    only: Iterable[str] | None = None,
    title: str = "",
) -> Report:
    """Run every property on an aggregator. Never raises for what the aggregator does: that is a failed property.

    Args:
        aggregate: the function, or an object with such a method.
        promise: a key of PROMISES.
        trains: which parts (``lora_A``, ``lora_B``, ``head``) or tensors clients send, or a function of the round that
            says so. Default: what the object's ``sent_names`` or ``trained_names(state, round)`` says, else all three
            parts.
        ranks: what clients that hold only the first r_k directions amount to. "changes": their changes are added to
            the state; "held": the means are over what they hold, padded with zeros. False: all ranks are equal.
        start: what a client starts the next round from, given the new state and its id; default: the new state.
        personal: parts that every client keeps to itself. ``aggregate`` finds them among the updates, unless there is
            ``keep``.
        keep: called with a client and its personal tensors before the aggregation, for those that store them elsewhere.
        rewrites: parts that the server may change although no client sends them (FedSVD's A).
        at_scale: the aggregator as it is made for a run of scale s = α/r, if it is told s at all.
        fresh: the aggregator as another process would make it, which goes on from what the first one saved; default:
            the same one.
        reweigh: the weights that factors get, from (state, updates, weights), where they are not the given ones
            (HetLoRA's, by norm).
        refuses: exceptions that count as refusing an update with NaN in it.
        tolerance: relative error allowed; the default fits float32 arithmetic.
        only: names of the properties to run; default all of PROPERTIES.
        title: heads the report; default: the aggregator's name.

    Raises ValueError for an unknown promise, property, part or meaning of ranks.
    """
    wanted = list(PROPERTIES if only is None else only)
    for name, value, known in (
        ("promise", [promise], PROMISES),
        ("only", wanted, PROPERTIES),
        ("ranks", [ranks or "changes"], ("changes", "held")),
        ("personal", list(personal), PARTS),
        ("rewrites", list(rewrites), PARTS),
    ):
        if unknown := [item for item in value if item not in known]:
            raise ValueError(f"{name}: {unknown[0]!r} is none of {', '.join(map(repr, known))}")
    subject = Subject(
        _server(aggregate),
        promise,
        _names(aggregate, trains),
        (lambda: _server(fresh())) if fresh is not None else (lambda: _server(aggregate)),
        str(ranks or ""),
        start,
        tuple(personal),
        keep,
        tuple(rewrites),
        (lambda s: _server(at_scale(s))) if at_scale is not None else None,
        reweigh,
        refuses if isinstance(refuses, tuple) else (refuses,),
        tolerance,
    )
    findings = tuple(_finding(name, subject) for name in wanted)
    return Report(title or getattr(aggregate, "__name__", type(aggregate).__name__), promise, findings)


def markdown(reports: Sequence[Report]) -> str:
    """A table of property × aggregator: ✓ holds, ✗ fails, – does not apply. All reports are of the same properties."""
    marks = {True: "✓", False: "✗", None: "–"}
    names = [finding.name for finding in reports[0].findings] if reports else []
    if odd := [report.title for report in reports if [f.name for f in report.findings] != names]:
        raise ValueError(f"the report of {odd[0]!r} is of other properties than that of {reports[0].title!r}")
    rows = [["property", *(f"`{report.title}`" for report in reports)], ["---"] * (len(reports) + 1)]
    rows += [[name, *(marks[report[name].ok] for report in reports)] for name in names]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows).replace("| --- ", "|---").replace("--- |", "---|")


def _finding(name: str, subject: Subject) -> Finding:
    try:
        return replace(PROPERTIES[name](subject), name=name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return Finding(False, f"{type(error).__name__}: {reason}", name=name)


class _WithoutMemory:
    """A plain function as an aggregator."""

    def __init__(self, function: Aggregate) -> None:
        self._function = function

    def init(self, state: State) -> ServerState:
        return {}

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        return self._function(state, cast(Any, updates), cast(Any, weights), round.number), {}


def _server(aggregate: Any) -> Aggregator:
    """An aggregator from whatever of the accepted forms was given."""
    if hasattr(aggregate, "init") and hasattr(aggregate, "aggregate"):
        return cast(Aggregator, aggregate)
    function = getattr(aggregate, "aggregate", aggregate)
    if not callable(function):
        raise ValueError(f"aggregate must be a function or have a method of that name, got {type(aggregate).__name__}")
    return _WithoutMemory(function)


def _names(aggregate: Any, trains: Trains | None) -> Callable[[State, int], list[str]]:
    """Names of what is sent in a round, from parts, names or the object's own answer."""
    if trains is None:
        own = getattr(aggregate, "sent_names", None) or getattr(aggregate, "trained_names", None)
        if own is not None:
            return lambda state, round_number: list(own(state, round_number))
        trains = PARTS
    if not callable(trains) and (odd := sorted(item for item in trains if "." not in item and item not in PARTS)):
        raise ValueError(f"trains: {odd[0]!r} is neither a part ({', '.join(PARTS)}) nor the name of a tensor")

    def names(state: State, round_number: int) -> list[str]:
        chosen = set(trains(round_number) if callable(trains) else trains)
        return sorted(n for n in state if part_of(n) not in RESIDUAL and (n in chosen or part_of(n) in chosen))

    return names
