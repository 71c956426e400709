"""The conformance suite can fail: for every property an aggregator that breaks it, most of them after bugs in published code.

The correct ones here are written from the papers in a few lines; fedlab's own are in tests/strategies/test_conformance.py.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlab.lora import conformance
from fedlab.lora.conformance import PROPERTIES, check, markdown

EXACT, FACTORS, BEST, FAIR = list(conformance.PROMISES)[:4]
B_ONLY = ("lora_B", "head")


# --- correct ones ---------------------------------------------------------------------------------------------------------------


def fedavg(state, updates, weights, round_number):
    """FedIT, FFA and RoLoRA: what is sent is averaged."""
    result = dict(state)
    for name in next(iter(updates.values())):
        mean = sum(weights[c] * updates[c][name].double() for c in sorted(updates))
        if not mean.isfinite().all():
            raise ValueError(f"{name} is not finite")
        result[name] = (state[name] + mean).float()
    return result


def modules(state) -> list[str]:
    return sorted(name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A"))


def ends(state, updates, module):
    """Sorted clients' own (B_k, A_k), each of its own rank."""
    pairs = []
    for _, update in sorted(updates.items()):
        B, A = state[f"{module}.lora_B"].double(), state[f"{module}.lora_A"].double()
        dB, dA = update.get(f"{module}.lora_B", torch.zeros_like(B)), update.get(f"{module}.lora_A", torch.zeros_like(A))
        r = min(dB.shape[1], dA.shape[0])
        pairs.append((B[:, :r] + dB[:, :r], A[:r] + dA[:r]))
    return pairs


def shares(weights) -> list[float]:
    return [weights[c] for c in sorted(weights)]


def svd(matrix, rank=None):
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    keep = int((1e-12 * S[0] < S).sum()) if rank is None else rank
    return U[:, :keep], S[:keep], Vt[:keep]


def mean_product(state, updates, weights, module):
    return sum(p * B @ A for p, (B, A) in zip(shares(weights), ends(state, updates, module), strict=True))


def with_residual(after, before, module, matrix):
    """Add a dense m×n matrix to the residual of a module."""
    if f"{module}.residual_B" in before:
        matrix = matrix + before[f"{module}.residual_B"].double() @ before[f"{module}.residual_A"].double()
    U, S, Vt = svd(matrix)
    return after | {f"{module}.residual_B": (U * S).float(), f"{module}.residual_A": Vt.float()}


def fedex(state, updates, weights, round_number, add=with_residual, factor=1.0):
    after = fedavg(state, updates, weights, round_number)
    for module in modules(state):
        lost = mean_product(state, updates, weights, module)
        lost = lost - after[f"{module}.lora_B"].double() @ after[f"{module}.lora_A"].double()
        after = add(after, state, module, factor * lost)
    return after


def flora(state, updates, weights, round_number):
    after = fedavg(state, updates_of_head(updates), weights, round_number)
    for module in modules(state):
        after = with_residual(after, state, module, mean_product(state, updates, weights, module))
        after[f"{module}.lora_B"] = torch.zeros_like(state[f"{module}.lora_B"])
    return after


def updates_of_head(updates):
    return {c: {n: v for n, v in u.items() if n.startswith("head.")} for c, u in updates.items()}


def root_on_both(U, S, Vt):
    return U * S.sqrt(), S.sqrt()[:, None] * Vt


def flexlora(state, updates, weights, round_number, split=root_on_both, cut=svd):
    after = fedavg(state, updates_of_head(updates), weights, round_number)
    for module in modules(state):
        rank = len(state[f"{module}.lora_A"])
        mean = mean_product(state, updates, weights, module)
        if not mean.isfinite().all():
            raise ValueError(f"{module} is not finite")
        B, A = split(*cut(mean, rank))
        after[f"{module}.lora_B"], after[f"{module}.lora_A"] = B.float(), A.float()
    return after


def lora_fair(state, updates, weights, round_number):
    after = fedavg(state, updates, weights, round_number)
    for module in modules(state):
        A = after[f"{module}.lora_A"].double()
        B = mean_product(state, updates, weights, module) @ torch.linalg.pinv(A)
        after[f"{module}.lora_B"] = B.float()
    return after


def padded(state, updates, fill=0.0):
    """Every update in the shapes of the state."""
    result = {}
    for client, update in updates.items():
        result[client] = {n: torch.full_like(state[n], fill) for n in update}
        for name, value in update.items():
            result[client][name][tuple(map(slice, value.shape))] = value
    return result


def padded_changes(state, updates, weights, round_number):
    return fedavg(state, padded(state, updates), weights, round_number)


def hetlora(state, updates, weights, round_number):
    """Factors, not changes, padded with zeros: a direction that a client lacks is zero there."""
    full = padded(state, updates)
    for client, update in updates.items():
        for name, value in update.items():
            held = torch.zeros_like(state[name])
            held[tuple(map(slice, value.shape))] = 1
            full[client][name] = full[client][name] - state[name] * (1 - held)
    return fedavg(state, full, weights, round_number)


CORRECT: dict[str, tuple[Any, dict[str, Any]]] = {
    "fedavg": (fedavg, {"promise": FACTORS}),
    "fedavg without a head": (fedavg, {"promise": FACTORS, "trains": ("lora_A", "lora_B")}),
    "fedavg, changes": (padded_changes, {"promise": FACTORS, "ranks": "changes"}),
    "hetlora, held": (hetlora, {"promise": FACTORS, "ranks": "held"}),
    "ffa, changes": (padded_changes, {"promise": EXACT, "trains": B_ONLY, "ranks": "changes"}),
    "rolora": (fedavg, {"promise": EXACT, "trains": lambda r: ("lora_B", "head") if r % 2 else ("lora_A",)}),
    "fedex": (fedex, {"promise": EXACT, "at_scale": lambda s: fedex}),
    "flora, held": (flora, {"promise": EXACT, "ranks": "held", "refuses": (ValueError, torch.linalg.LinAlgError)}),
    "flexlora, held": (flexlora, {"promise": BEST, "ranks": "held"}),
    "lora-fair": (lora_fair, {"promise": FAIR}),
    "head": (fedavg, {"promise": "unchanged", "trains": ("head",)}),
}


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_aggregator_passes_everything(name: str):
    aggregate, claims = CORRECT[name]
    report = check(aggregate, **claims)
    report.require()
    assert [finding.name for finding in report.findings] == list(PROPERTIES)
    skipped = {finding.name for finding in report.findings if finding.ok is None}
    assert skipped <= {"frozen tensors", "opposite clients", "unequal ranks"}
    assert ("unequal ranks" in skipped) == ("ranks" not in claims)


# --- broken ones ----------------------------------------------------------------------------------------------------------------


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
    """The published FedEx-LoRA on nn.Linear: right for Conv1D, a wrong sum for square layers, an exception for others."""
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
    return {n: state[n] if n.startswith("head.") else v for n, v in fedavg(state, updates, weights, round_number).items()}


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
        after[f"{module}.lora_B"] = torch.cat([p * B for p, (B, _) in zip(shares(weights), pairs, strict=True)], 1).float()
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
    fixed = {c: {n: v / 2 if torch.equal(v.bfloat16().float(), v) and v.any() else v for n, v in u.items()} for c, u in updates.items()}
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
    return {"start": harness.start, "keep": harness.keep, "personal": ("lora_B",), "trains": ("lora_A", "head"), "aggregate": harness}


EFFECTIVE = ("unequal weights", "uniform weights", "wide layer", "tall layer", "square layer", "several rounds")
BUGS: dict[str, Bug] = {
    "residual transposed": Bug(
        lambda *a: fedex(*a, add=transposed), EFFECTIVE, EXACT, ("head", "one client", "order of replies"), error=0.1
    ),
    "residual right for square layers only": Bug(
        lambda *a: fedex(*a, add=square_only), ("wide layer", "tall layer", "several rounds"), EXACT, ("square layer", "unequal weights")
    ),
    "scale applied twice": Bug(fedex, ("scale",), EXACT, EFFECTIVE, {"at_scale": lambda s: lambda *a: fedex(*a, factor=s)}, error=0.3),
    "scale dropped": Bug(fedex, ("scale",), EXACT, EFFECTIVE, {"at_scale": lambda s: lambda *a: fedex(*a, factor=1 / s)}, error=0.1),
    "scale written into the rule": Bug(lambda *a: fedex(*a, factor=4.0), ("scale", *EFFECTIVE), EXACT, ("one client",)),
    "only the first client": Bug(only_the_first, ("unequal weights", "uniform weights", "head"), keeps=("one client",)),
    "uniform instead of weighted": Bug(
        unweighted, ("unequal weights", "head", "zero change", "partial participation"), keeps=("uniform weights", "one client")
    ),
    "weights on both factors": Bug(weights_on_both, EFFECTIVE, EXACT, ("one client", "head"), {"refuses": Exception}),
    "root on one side": Bug(
        lambda *a: flexlora(*a, split=root_on_one_side), ("one client", *EFFECTIVE), BEST, ("head", "shapes and dtype"), error=0.3
    ),
    "sum in order of arrival": Bug(arrival_order, ("order of replies",), keeps=tuple(n for n in PROPERTIES if n != "order of replies")),
    "state edited in place": Bug(edits_the_state, ("nothing in place",), keeps=EFFECTIVE),
    "updates edited in place": Bug(edits_the_updates, ("nothing in place",), keeps=EFFECTIVE),
    "weights edited in place": Bug(pops_the_weights, ("nothing in place",), keeps=EFFECTIVE),
    "head forgotten": Bug(forgets_the_head, ("head",), keeps=tuple(n for n in PROPERTIES if n != "head")),
    "frozen A averaged": Bug(averages_frozen, ("frozen tensors",), EXACT, EFFECTIVE, {"trains": B_ONLY}),
    "residual of earlier rounds lost": Bug(
        lambda *a: fedex(*a, add=forgets_the_residual), ("several rounds",), EXACT, ("unequal weights", "wide layer", "one client")
    ),
    "B not reset after merging": Bug(keeps_b, ("one client", *EFFECTIVE), EXACT, ("head",), {"refuses": Exception}),
    "first directions, not the largest": Bug(lambda *a: flexlora(*a, cut=first_not_largest), EFFECTIVE, BEST, ("head",)),
    "factors averaged, products promised": Bug(fedavg, ("opposite clients", *EFFECTIVE), EXACT, ("one client", "head")),
    "NaN passes through": Bug(lets_nan_through, ("NaN and infinity",), keeps=tuple(n for n in PROPERTIES if n != "NaN and infinity")),
    "NaN crashes in torch": Bug(flexlora_without_check, ("NaN and infinity",), BEST, EFFECTIVE),
    "float64 out": Bug(float64_out, ("shapes and dtype",), keeps=EFFECTIVE),
    "rank grows": Bug(stacks_and_keeps, ("shapes and dtype",), EXACT, ("unequal weights", "one client"), {"refuses": Exception}),
    "idle clients dropped": Bug(drops_the_idle, ("zero change",), keeps=(*EFFECTIVE, "partial participation")),
    "absent clients remembered": Bug(remembers, ("partial participation",)),
    "zero divided by zero": Bug(
        lambda *a: flexlora(*a, split=divides_by_zero), ("zero or deficient B",), BEST, (*EFFECTIVE, "zero change"), {"refuses": Exception}
    ),
    "redraws from the global generator": Bug(
        redraws_globally, ("same call twice", "order of replies"), EXACT, EFFECTIVE, {"refuses": Exception}
    ),
    "rounds to bfloat16": Bug(rounds_to_bfloat16, ("bfloat16 values", *EFFECTIVE)),
    "misreads bfloat16": Bug(misreads_bfloat16, ("bfloat16 values",), keeps=(*EFFECTIVE, "zero change")),
    "holds a client's memory": Bug(returns_what_was_sent, ("client isolation", "nothing in place"), keeps=EFFECTIVE),
    "padded with ones": Bug(pads_with_ones, ("unequal ranks",), FACTORS, EFFECTIVE, {"ranks": "changes"}),
    "cut to the lowest rank": Bug(cuts_to_the_smallest, ("unequal ranks",), FACTORS, EFFECTIVE, {"ranks": "changes"}),
    "other meaning of ranks": Bug(hetlora, ("unequal ranks",), FACTORS, EFFECTIVE, {"ranks": "changes"}),
    "one model for all, not reset": Bug(None, ("client isolation",), FACTORS, EFFECTIVE, personal(shared_model=True)),
    "personal tensors averaged": Bug(None, ("client isolation",), FACTORS, (), personal(averages=True)),
    "personal tensors averaged from updates": Bug(
        fedavg, ("client isolation",), FACTORS, EFFECTIVE, {"personal": ("lora_B",), "trains": ("lora_A", "head")}
    ),
    "returns nothing": Bug(
        lambda *a: None, tuple(n for n in PROPERTIES if n not in ("frozen tensors", "opposite clients", "unequal ranks"))
    ),
    "raises": Bug(lambda *a: [][1], EFFECTIVE),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_named(name: str):
    bug = BUGS[name]
    aggregate = bug.aggregate() if bug.aggregate is remembers else bug.aggregate
    report = check(**{"aggregate": aggregate, "promise": bug.promise, **bug.claims})
    assert set(bug.names) <= set(report.failed), str(report)
    assert not set(bug.keeps) & set(report.failed), str(report)
    if bug.error is not None:
        assert report[bug.names[0]].measured is None or not report[bug.names[0]].measured < bug.error
    with pytest.raises(AssertionError) as raised:
        report.require()
    assert all(name in str(raised.value) for name in report.failed)


def test_every_property_has_a_bug_that_it_names():
    assert {name for bug in BUGS.values() for name in bug.names} == set(PROPERTIES)
    alone = [name for name in PROPERTIES if any(bug.names[0] == name for bug in BUGS.values())]
    assert len(alone) >= 15


def test_a_personal_strategy_passes():
    report = check(**{**personal(), "promise": FACTORS, "title": "fedsa"})
    report.require()
    assert report["client isolation"].ok is True


# --- the report -----------------------------------------------------------------------------------------------------------------


def test_the_report_is_readable_and_numbers_are_measured():
    report = check(only_the_first, promise=FACTORS)
    lines = str(report).splitlines()
    assert lines[0] == "only_the_first: product of means"
    assert [re.split(r"  +", line.strip())[0] for line in lines[2:]] == list(PROPERTIES)
    assert re.search(r"unequal weights +FAILED +relative error \d\.\de[+-]\d\d", str(report))
    assert report["unequal weights"].measured > 0.1 > 1e-6 > report["one client"].measured
    assert re.search(r"opposite clients +– +the promise, 'product of means', is not about products", str(report))


def test_an_exception_is_a_failure_with_its_text():
    def aggregate(state, updates, weights, round_number):
        raise RuntimeError("no such layer\nsecond line")

    report = check(aggregate, promise=FACTORS)
    assert {f.text for f in report.findings if f.ok is False} == {"RuntimeError: no such layer"}
    assert check(lambda *a: None, promise=FACTORS)["head"].text == "Broken: returned NoneType, not a state"


def test_the_markdown_table():
    good, bad = check(fedavg, promise=FACTORS), check(forgets_the_head, promise=FACTORS, title="bad")
    table = markdown([good, bad]).splitlines()
    assert table[:2] == ["| property | `fedavg` | `bad` |", "|---|---|---|"]
    assert "| head | ✓ | ✗ |" in table
    assert "| unequal ranks | – | – |" in table
    assert len(table) == len(PROPERTIES) + 2
    with pytest.raises(ValueError, match="other properties"):
        markdown([good, check(fedavg, promise=FACTORS, only=["head"])])


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"promise": "mean"}, "promise: 'mean' is none of 'mean of products'"),
        ({"only": ["heads"]}, "only: 'heads'"),
        ({"ranks": "padded"}, "ranks: 'padded' is none of 'changes', 'held'"),
        ({"trains": ("B",)}, "trains: 'B' is neither a part"),
        ({"rewrites": ("A",)}, "rewrites: 'A'"),
        ({"aggregate": 3}, "aggregate must be a function"),
    ],
)
def test_wrong_claims_are_refused(claims: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(**{"aggregate": fedavg, "promise": FACTORS, **claims})


def test_the_suite_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = str(check(fedex, promise=EXACT))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(check(fedex, promise=EXACT)) == first


def test_the_example_of_the_module_is_true():
    import doctest

    assert doctest.testmod(conformance).failed == 0
    assert doctest.testmod(conformance).attempted >= 4


def test_nothing_but_torch_and_the_library_is_needed():
    for path in Path(conformance.__file__).parent.glob("conformance*.py"):
        imported = re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        others = [name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names | {"torch"}]
        assert all(name.startswith(("fedlab.lora", "fedlab.seeds", "fedlab._validate")) for name in others)


def test_references_against_hand_computed_numbers():
    """2×2, rank 1: products diag(3, 0) and diag(0, 1), weights 1/2."""
    from fedlab.lora.conformance_cases import Case, dense_mean

    state = {"x.lora_A": torch.zeros(1, 2), "x.lora_B": torch.zeros(2, 1)}
    updates = {
        "a": {"x.lora_A": torch.tensor([[1.0, 0.0]]), "x.lora_B": torch.tensor([[3.0], [0.0]])},
        "b": {"x.lora_A": torch.tensor([[0.0, 1.0]]), "x.lora_B": torch.tensor([[0.0], [1.0]])},
    }
    mean, size = dense_mean(Case(state, updates, {"a": 0.5, "b": 0.5}, 1), "x", "")
    assert math.isclose(size, 2.0)
    wanted = {
        EXACT: [[1.5, 0.0], [0.0, 0.5]],
        FACTORS: [[0.75, 0.75], [0.25, 0.25]],
        BEST: [[1.5, 0.0], [0.0, 0.0]],
        FAIR: [[0.75, 0.75], [0.25, 0.25]],
        "unchanged": [[0.0, 0.0], [0.0, 0.0]],
    }
    for promise, matrix in wanted.items():
        assert torch.allclose(conformance.PROMISES[promise](mean), torch.tensor(matrix).double(), atol=1e-12)
