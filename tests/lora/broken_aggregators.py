"""LoRA aggregators that are wrong, most of them after bugs in published code, and
the properties that must name them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from aggregators import (
    B_ONLY,
    BEST,
    EXACT,
    FACTORS,
    ends,
    fedavg,
    fedex,
    flexlora,
    flora,
    hetlora,
    hetlora_by_norm,
    mean_product,
    modules,
    padded,
    root_on_both,
    shares,
    svd,
    updates_of_head,
    with_residual,
)

from fedlab.lora.conformance import PROPERTIES


@dataclass(frozen=True)
class Bug:
    """A broken aggregator: the properties that must name it, and some that it keeps."""

    aggregate: Any
    names: tuple[str, ...]
    promise: str = FACTORS
    keeps: tuple[str, ...] = ()
    claims: dict[str, Any] = field(default_factory=dict)
    error: float | None = None  # at least this, measured by the first property


def transposed(after, before, module, matrix):
    """The published FedEx-LoRA on nn.Linear: right for Conv1D, a wrong sum for square layers,
    an exception for others.
    """
    return with_residual(after, before, module, matrix.T)


def square_only(after, before, module, matrix):
    """Kept in the layout of a layer that happens to be square."""
    return with_residual(after, before, module, matrix.reshape(matrix.T.shape))


def only_the_first(state, updates, weights, round_number):
    """The shared model is saved after the first client."""
    first = sorted(updates)[0]
    return fedavg(state, {first: updates[first]}, {first: 1.0}, round_number)


def unweighted(state, updates, weights, round_number):
    return fedavg(state, updates, dict.fromkeys(updates, 1 / len(updates)), round_number)


def weights_on_both(state, updates, weights, round_number):
    """FLoRA's stacking with p_k in B and again in A."""
    after = fedavg(state, updates_of_head(updates), weights, round_number)
    for module in modules(state):
        squares = [p * p for p in shares(weights)]
        total = sum(p * B @ A for p, (B, A) in zip(squares, ends(state, updates, module), strict=True))
        after = with_residual(after, state, module, total)
        after[f"{module}.lora_B"] = torch.zeros_like(state[f"{module}.lora_B"])
    return after


def root_on_one_side(U, S, Vt):
    """FedLLM-Factory's FlexLoRA: wrong with a single client."""
    return U * S.sqrt(), Vt


def arrival_order(state, updates, weights, round_number):
    result = dict(state)
    for name in next(iter(updates.values())):
        total = torch.zeros_like(state[name])
        for client, update in updates.items():
            total = total + weights[client] * update[name]
        if not total.isfinite().all():
            raise ValueError(name)
        result[name] = state[name] + total
    return result


def edits_the_state(state, updates, weights, round_number):
    after = fedavg(state, updates, weights, round_number)
    for name, value in after.items():
        state[name].copy_(value)
    return state


def edits_the_updates(state, updates, weights, round_number):
    for client, update in updates.items():
        for value in update.values():
            value.mul_(weights[client])
    return fedavg(state, updates, dict.fromkeys(updates, 1.0), round_number)


def pops_the_weights(state, updates, weights, round_number):
    after = fedavg(state, updates, weights, round_number)
    weights.clear()
    return after


def forgets_the_head(state, updates, weights, round_number):
    return {
        n: state[n] if n.startswith("head.") else v for n, v in fedavg(state, updates, weights, round_number).items()
    }


def averages_frozen(state, updates, weights, round_number):
    """All factors are averaged as the clients hold them, also A, which is the same everywhere but for rounding."""
    after = fedavg(state, updates, weights, round_number)
    for module in modules(state):
        after[f"{module}.lora_A"] = sum(torch.tensor(p) * state[f"{module}.lora_A"] for p in shares(weights))
    return after


def forgets_the_residual(after, before, module, matrix):
    return with_residual(after, {}, module, matrix)


def keeps_b(state, updates, weights, round_number):
    """FLoRA that merges into the base and does not begin a new adapter."""
    after = fedavg(state, updates, weights, round_number)
    for module in modules(state):
        after = with_residual(after, state, module, mean_product(state, updates, weights, module))
    return after


def first_not_largest(matrix, rank):
    """The first directions of an eigendecomposition, which sorts upwards."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    U = vectors[:, :rank]
    S = values[:rank].clamp(min=0).sqrt()
    return U, S, (U.T @ matrix) / S.clamp(min=1e-300)[:, None]


def lets_nan_through(state, updates, weights, round_number):
    mean = {n: sum(weights[c] * updates[c][n] for c in sorted(updates)) for n in next(iter(updates.values()))}
    return {n: v + mean[n] if n in mean else v for n, v in state.items()}


def flexlora_without_check(state, updates, weights, round_number):
    """NaN ends in torch's own error, which names neither the client nor the tensor."""
    after = fedavg(state, updates_of_head(updates), weights, round_number)
    for module in modules(state):
        B, A = root_on_both(*svd(mean_product(state, updates, weights, module), len(state[f"{module}.lora_A"])))
        after[f"{module}.lora_B"], after[f"{module}.lora_A"] = B.float(), A.float()
    return after


def float64_out(state, updates, weights, round_number):
    return {n: v.double() for n, v in fedavg(state, updates, weights, round_number).items()}


def stacks_and_keeps(state, updates, weights, round_number):
    """FLoRA's stacked factors returned as the adapter: the rank grows with every round."""
    after = fedavg(state, updates_of_head(updates), weights, round_number)
    for module in modules(state):
        pairs = ends(state, updates, module)
        after[f"{module}.lora_B"] = torch.cat(
            [p * B for p, (B, _) in zip(shares(weights), pairs, strict=True)], 1
        ).float()
        after[f"{module}.lora_A"] = torch.cat([A for _, A in pairs], 0).float()
    return after


def drops_the_idle(state, updates, weights, round_number):
    """Clients that changed nothing are taken for failed ones, and the weights renormalised."""
    busy = [c for c, u in updates.items() if any(v.any() for v in u.values())]
    if not busy:
        return dict(state)
    total = sum(weights[c] for c in busy)
    return fedavg(state, {c: updates[c] for c in busy}, {c: weights[c] / total for c in busy}, round_number)


def remembers() -> Callable[..., Any]:
    """Absent clients count with what they sent last: the dictionary of replies is not emptied between rounds."""
    seen: dict[str, Any] = {}
    sizes: dict[str, float] = {}

    def aggregate(state, updates, weights, round_number):
        seen.update(updates)
        sizes.update(weights)
        return fedavg(state, seen, {c: w / sum(sizes.values()) for c, w in sizes.items()}, round_number)

    return aggregate


def divides_by_zero(U, S, Vt):
    """Normalised directions, then their length: 0/0 where a direction carries nothing."""
    B = U * S
    length = B.norm(dim=0)
    return (B / length) * length.sqrt(), length.sqrt()[:, None] * Vt


def redraws_globally(state, updates, weights, round_number):
    after = flora(state, updates, weights, round_number)
    return after | {n: torch.randn(v.shape) for n, v in after.items() if n.endswith("lora_A")}


def rounds_to_bfloat16(state, updates, weights, round_number):
    return {n: v.bfloat16().float() for n, v in fedavg(state, updates, weights, round_number).items()}


def misreads_bfloat16(state, updates, weights, round_number):
    """Takes values without low bits for a 16-bit wire and undoes a scaling that nobody applied."""
    fixed = {
        c: {n: v / 2 if torch.equal(v.bfloat16().float(), v) and v.any() else v for n, v in u.items()}
        for c, u in updates.items()
    }
    return fedavg(state, fixed, weights, round_number)


def returns_what_was_sent(state, updates, weights, round_number):
    """With full weight on one tensor no copy is made: the state holds a client's own memory."""
    after = fedavg(state, updates, weights, round_number)
    for client in sorted(updates)[:1]:
        for name in updates[client]:
            after[name] = updates[client][name].copy_(after[name])
    return after


def pads_with_ones(state, updates, weights, round_number):
    return fedavg(state, padded(state, updates, 1.0), weights, round_number)


def cuts_to_the_smallest(state, updates, weights, round_number):
    """Every client is cut to the lowest rank: what the others learned beyond it is lost."""
    after = dict(state)
    for name in next(iter(updates.values())):
        shape = [min(sizes) for sizes in zip(*(u[name].shape for u in updates.values()), strict=True)]
        cut = tuple(map(slice, shape))
        mean = sum(weights[c] * updates[c][name][cut].double() for c in sorted(updates))
        if not mean.isfinite().all():
            raise ValueError(name)
        after[name] = state[name].clone()
        after[name][cut] = (state[name][cut] + mean).float()
    return after


class Personal:
    """FedSA in a simulation: A is shared, every client keeps its own B."""

    def __init__(self, shared_model: bool = False, averages: bool = False) -> None:
        self.own: dict[str, Any] = {}
        self.model: dict[str, Any] = {}
        self.shared_model, self.averages = shared_model, averages

    def keep(self, client, tensors):
        self.own[client] = {n: v.clone() for n, v in tensors.items()}

    def aggregate(self, state, updates, weights, round_number):
        after = fedavg(state, updates, weights, round_number)
        if self.averages and self.own:
            for name in next(iter(self.own.values())):
                after[name] = sum(own[name] for own in self.own.values()) / len(self.own)
        return after

    def start(self, state, client):
        if not self.shared_model:
            return {**state, **self.own.get(client, {})}
        if not self.model:  # one model that all clients train in turn; only what is shared is written into it again
            self.model = {**state, **self.own.get(client, {})}
        self.model |= {n: v for n, v in state.items() if not n.endswith("lora_B")}
        return self.model


def personal(**options: bool) -> dict[str, Any]:
    harness = Personal(**options)
    return {
        "start": harness.start,
        "keep": harness.keep,
        "personal": ("lora_B",),
        "trains": ("lora_A", "head"),
        "aggregate": harness,
    }


class Momentum:
    """A right one with server momentum; what it keeps, ``kept`` decides."""

    def __init__(self, kept: str = "server state") -> None:
        self._kept, self._own = kept, {}

    def init(self, state):
        return {}

    def aggregate(self, state, server_state, updates, weights, round):
        after = fedavg(state, updates, weights, round.number)
        before = self._own if self._kept == "between calls" else server_state
        if self._kept == "of the first round":  # and never again
            self._own = {n: after[n] - state[n] for n in state} if round.number == 1 else self._own
            return {n: v + 0.5 * self._own[n] if round.number > 1 else v for n, v in after.items()}, {}
        if self._kept == "in place" and before:
            for name, value in before.items():
                value.mul_(0.5).add_(after[name] - state[name])
            return {n: state[n] + before[n] for n in state}, before
        moment = {n: 0.5 * before.get(n, torch.zeros_like(v)) + after[n] - v for n, v in state.items()}
        if self._kept == "between calls":
            self._own = moment
            return {n: state[n] + moment[n] for n in state}, {}
        return {n: state[n] + moment[n] for n in state}, moment


EFFECTIVE = ("unequal weights", "uniform weights", "wide layer", "tall layer", "square layer", "several rounds")
MEMORY = ("same call twice", "nothing in place", "save, load, go on")
BUGS: dict[str, Bug] = {
    "residual transposed": Bug(
        lambda *a: fedex(*a, add=transposed), EFFECTIVE, EXACT, ("head", "one client", "order of replies"), error=0.1
    ),
    "residual right for square layers only": Bug(
        lambda *a: fedex(*a, add=square_only),
        ("wide layer", "tall layer", "several rounds"),
        EXACT,
        ("square layer", "unequal weights"),
    ),
    "scale applied twice": Bug(
        fedex, ("scale",), EXACT, EFFECTIVE, {"at_scale": lambda s: lambda *a: fedex(*a, factor=s)}, error=0.3
    ),
    "scale dropped": Bug(
        fedex, ("scale",), EXACT, EFFECTIVE, {"at_scale": lambda s: lambda *a: fedex(*a, factor=1 / s)}, error=0.1
    ),
    "scale written into the rule": Bug(lambda *a: fedex(*a, factor=4.0), ("scale", *EFFECTIVE), EXACT, ("one client",)),
    "only the first client": Bug(only_the_first, ("unequal weights", "uniform weights", "head"), keeps=("one client",)),
    "uniform instead of weighted": Bug(
        unweighted,
        ("unequal weights", "head", "zero change", "partial participation"),
        keeps=("uniform weights", "one client"),
    ),
    "weights on both factors": Bug(weights_on_both, EFFECTIVE, EXACT, ("one client", "head"), {"refuses": Exception}),
    "root on one side": Bug(
        lambda *a: flexlora(*a, split=root_on_one_side),
        ("one client", *EFFECTIVE),
        BEST,
        ("head", "shapes and dtype"),
        error=0.3,
    ),
    "sum in order of arrival": Bug(
        arrival_order, ("order of replies",), keeps=tuple(n for n in PROPERTIES if n != "order of replies")
    ),
    "state edited in place": Bug(edits_the_state, ("nothing in place",), keeps=EFFECTIVE),
    "updates edited in place": Bug(edits_the_updates, ("nothing in place",), keeps=EFFECTIVE),
    "weights edited in place": Bug(pops_the_weights, ("nothing in place",), keeps=EFFECTIVE),
    "head forgotten": Bug(forgets_the_head, ("head",), keeps=tuple(n for n in PROPERTIES if n != "head")),
    "frozen A averaged": Bug(averages_frozen, ("frozen tensors",), EXACT, EFFECTIVE, {"trains": B_ONLY}),
    "residual of earlier rounds lost": Bug(
        lambda *a: fedex(*a, add=forgets_the_residual),
        ("several rounds",),
        EXACT,
        ("unequal weights", "wide layer", "one client"),
    ),
    "B not reset after merging": Bug(keeps_b, ("one client", *EFFECTIVE), EXACT, ("head",), {"refuses": Exception}),
    "first directions, not the largest": Bug(
        lambda *a: flexlora(*a, cut=first_not_largest), EFFECTIVE, BEST, ("head",)
    ),
    "factors averaged, products promised": Bug(fedavg, ("opposite clients", *EFFECTIVE), EXACT, ("one client", "head")),
    "NaN passes through": Bug(
        lets_nan_through, ("NaN and infinity",), keeps=tuple(n for n in PROPERTIES if n != "NaN and infinity")
    ),
    "NaN crashes in torch": Bug(flexlora_without_check, ("NaN and infinity",), BEST, EFFECTIVE),
    "float64 out": Bug(float64_out, ("shapes and dtype",), keeps=EFFECTIVE),
    "rank grows": Bug(
        stacks_and_keeps, ("shapes and dtype",), EXACT, ("unequal weights", "one client"), {"refuses": Exception}
    ),
    "idle clients dropped": Bug(drops_the_idle, ("zero change",), keeps=(*EFFECTIVE, "partial participation")),
    "absent clients remembered": Bug(remembers, ("partial participation",)),
    "zero divided by zero": Bug(
        lambda *a: flexlora(*a, split=divides_by_zero),
        ("zero or deficient B",),
        BEST,
        (*EFFECTIVE, "zero change"),
        {"refuses": Exception},
    ),
    "redraws from the global generator": Bug(
        redraws_globally, ("same call twice", "order of replies"), EXACT, EFFECTIVE, {"refuses": Exception}
    ),
    "momentum kept between calls": Bug(Momentum("between calls"), ("same call twice", "save, load, go on")),
    "momentum of the first round kept": Bug(
        Momentum("of the first round"),
        ("save, load, go on",),
        keeps=("same call twice", "nothing in place"),
        claims={"fresh": lambda: Momentum("of the first round"), "only": MEMORY},
    ),
    "momentum edited in place": Bug(
        Momentum("in place"), ("nothing in place",), keeps=("same call twice", "save, load, go on")
    ),
    "rounds to bfloat16": Bug(rounds_to_bfloat16, ("bfloat16 values", *EFFECTIVE)),
    "misreads bfloat16": Bug(misreads_bfloat16, ("bfloat16 values",), keeps=(*EFFECTIVE, "zero change")),
    "holds a client's memory": Bug(returns_what_was_sent, ("client isolation", "nothing in place"), keeps=EFFECTIVE),
    "padded with ones": Bug(pads_with_ones, ("unequal ranks",), FACTORS, EFFECTIVE, {"ranks": "changes"}),
    "cut to the lowest rank": Bug(cuts_to_the_smallest, ("unequal ranks",), FACTORS, EFFECTIVE, {"ranks": "changes"}),
    "weighted by norm": Bug(hetlora_by_norm, ("unequal weights", "zero change"), FACTORS, ("one client", "head")),
    "other meaning of ranks": Bug(hetlora, ("unequal ranks",), FACTORS, EFFECTIVE, {"ranks": "changes"}),
    "one model for all, not reset": Bug(None, ("client isolation",), FACTORS, EFFECTIVE, personal(shared_model=True)),
    "personal tensors averaged": Bug(None, ("client isolation",), FACTORS, (), personal(averages=True)),
    "personal tensors averaged from updates": Bug(
        fedavg, ("client isolation",), FACTORS, EFFECTIVE, {"personal": ("lora_B",), "trains": ("lora_A", "head")}
    ),
    "returns nothing": Bug(
        lambda *a: None,
        tuple(n for n in PROPERTIES if n not in ("frozen tensors", "opposite clients", "unequal ranks")),
    ),
    "raises": Bug(lambda *a: [][1], EFFECTIVE),
}
