"""What the conformance suite gives to an aggregator, and what should come back.

States, updates and weights are drawn from fixed seeds. References are dense and in float64: plain products,
``torch.linalg.svd`` and
``pinv``. They share nothing with the compact algebra that they judge. Start at ``fedlab.lora.conformance``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fedlab.lora.aggregator import Aggregator, Round, ServerState
from fedlab.lora.state import RESIDUAL, State, modules, part_of
from fedlab.seeds import torch_stream

Aggregate = Callable[[State, dict[str, State], dict[str, float], int], State]  # without memory
Step = tuple[State, ServerState]
Start = Callable[[State, str], State]
Keep = Callable[[str, State], None]
Reweigh = Callable[[State, dict[str, State], dict[str, float]], dict[str, float]]
Shapes = Mapping[str, tuple[int, int]]  # module → (m, n)

RANK = 4
ROUNDS = (1, 2)  # of an alternating rule: both kinds
SQUARE: Shapes = {"layer.0.q": (16, 16), "layer.0.v": (12, 12)}
WIDE: Shapes = {"layer.0.down": (12, 20)}
TALL: Shapes = {"layer.0.up": (20, 12)}
EVERY: Shapes = {**SQUARE, "layer.1.q": (16, 16), **WIDE, **TALL}
WEIGHTS = {"client-0": 0.3, "client-1": 0.1, "client-2": 0.6}
HEAD = {"head.bias": (3,), "head.weight": (3, 5)}


@dataclass(frozen=True)
class Mean:
    """What one module's promise is made of, dense and in float64, without the residual that was there before."""

    received: Tensor  # B·A of the state that went out [m, n]
    products: Tensor  # the mean of the clients' products [m, n]
    B: Tensor  # the mean of their B [m, r]
    A: Tensor  # the mean of their A [r, n]


def _best(mean: Mean) -> Tensor:
    U, S, Vt = torch.linalg.svd(mean.products)
    rank = mean.A.shape[0]
    best: Tensor = U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]
    return best


def _projected(mean: Mean) -> Tensor:
    """argmin over B of ‖B·Ā − products‖, times Ā: the mean of the products on the row space of Ā."""
    projected: Tensor = mean.products @ torch.linalg.pinv(mean.A, rtol=1e-9) @ mean.A
    return projected


PROMISES: dict[str, Callable[[Mean], Tensor]] = {
    "mean of products": lambda mean: mean.products,
    "product of means": lambda mean: mean.B @ mean.A,
    "best of rank r of the mean of products": _best,
    "projected mean of products": _projected,
    "unchanged": lambda mean: mean.received,
}
OF_PRODUCTS = tuple(name for name in PROMISES if name.endswith("mean of products"))


@dataclass(frozen=True)
class Finding:
    """What one property came to."""

    ok: bool | None  # None: the property does not apply
    text: str  # what was measured, why it failed, or why it does not apply
    measured: float | None = None  # relative error, or number of tensors that are wrong
    name: str = ""  # of the property


class Broken(Exception):
    """What an aggregator returned cannot be judged."""


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    state: State
    updates: dict[str, State]
    weights: dict[str, float]
    round_number: int

    @property
    def round(self) -> Round:
        """The round as an aggregator with memory is told it."""
        return Round(self.round_number)

    def copy(self) -> Case:
        """A copy that shares no memory."""
        return Case(
            clone(self.state), {c: clone(u) for c, u in self.updates.items()}, dict(self.weights), self.round_number
        )


@dataclass(frozen=True)
class Subject:
    """The aggregator under test and what is claimed for it;
    the fields are those of ``fedlab.lora.conformance.check``.
    """

    server: Aggregator
    promise: str
    names: Callable[[State, int], Collection[str]]  # of the tensors that clients send in a round
    fresh: Callable[[], Aggregator]  # the aggregator as another process makes it
    ranks: str = ""
    start: Start | None = None
    personal: Collection[str] = ()
    keep: Keep | None = None
    rewrites: Collection[str] = ()
    at_scale: Callable[[float], Aggregator] | None = None
    reweigh: Reweigh | None = None
    refuses: tuple[type[Exception], ...] = (ValueError,)
    tolerance: float = 1e-5

    def case(
        self,
        shapes: Shapes = SQUARE,
        weights: Mapping[str, float] = WEIGHTS,
        round_number: int = 1,
        state: State | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> Case:
        """A drawn call; ``ranks`` are those of clients that hold fewer directions than the state."""
        state = clone(state) if state is not None else draw_state(shapes)
        names = sorted(self.names(state, round_number))
        updates = {}
        for client in weights:
            own = narrow(state, (ranks or {}).get(client, RANK))
            updates[client] = {name: draw(own[name].shape, "update", client, name, round_number) for name in names}
        return Case(state, updates, dict(weights), round_number)

    def run(self, case: Case, server: Aggregator | None = None) -> State:
        """The state that comes back for a copy of the case, of a server that remembers nothing yet.

        Raises Broken if it is none.
        """
        server = server or self.server
        return self.step(case, dict(server.init(clone(case.state))), server)[0]

    def step(self, case: Case, server_state: ServerState, server: Aggregator | None = None) -> Step:
        """What comes back for a copy of the case. Raises Broken if that is not a state and a server's state."""
        answer = aggregated(server or self.server, case.copy(), clone(server_state))
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise Broken(f"returned {type(answer).__name__}, not (state, server state)")
        after, kept = answer
        if not isinstance(kept, Mapping) or not all(isinstance(value, Tensor) for value in kept.values()):
            raise Broken("the server's state is not a dictionary of tensors")
        if not isinstance(after, Mapping):
            raise Broken(f"returned {type(after).__name__}, not a state")
        if missing := sorted(case.state.keys() - after.keys() - set(residual_names(case.state))):
            raise Broken(f"{missing[0]} is missing from what was returned")
        if odd := sorted(name for name, value in after.items() if not isinstance(value, Tensor)):
            raise Broken(f"{odd[0]} is a {type(after[odd[0]]).__name__}, not a tensor")
        return dict(after), dict(kept)

    def error(self, case: Case, after: State, scale: float = 1.0) -> float:
        """Largest relative error over the modules of scale·(B·A + residual) to what is promised; NaN if any is NaN."""
        errors = [0.0]
        if self.reweigh is not None:
            case = replace(case, weights=self.reweigh(case.state, case.updates, case.weights))
        for module in modules(case.state):
            mean, size = dense_mean(case, module, self.ranks)
            wanted = scale * (PROMISES[self.promise](mean) + dense_residual(case.state, module))
            gap = float((scale * dense(after, module) - wanted).norm())
            size = max(scale * size, float(wanted.norm()))
            errors.append(gap / size if size else gap)
        return largest(errors)


def aggregated(server: Aggregator, case: Case, server_state: ServerState | None = None) -> Step:
    """What the aggregator makes of this very case; without ``server_state`` it remembers nothing yet."""
    server_state = server.init(case.state) if server_state is None else server_state
    return server.aggregate(case.state, server_state, case.updates, case.weights, case.round)


def draw_state(shapes: Shapes = SQUARE) -> State:
    """A state of rank RANK with these modules and a head, no tensor of it zero."""
    state = {name: draw(shape, "state", name) for name, shape in HEAD.items()}
    for module, (m, n) in shapes.items():
        state[f"{module}.lora_A"] = draw((RANK, n), "state", module, "A")
        state[f"{module}.lora_B"] = draw((m, RANK), "state", module, "B")
    return state


def draw(shape: Sequence[int], *names: str | int) -> Tensor:
    """N(0, 1) in float32, from the stream of these names."""
    return _drawn(tuple(shape), *names).clone()


@cache
def _drawn(shape: tuple[int, ...], *names: str | int) -> Tensor:
    generator = torch_stream(0, "conformance", *names)
    return torch.randn(shape, generator=generator)


def clone(state: Mapping[str, Tensor]) -> State:
    """A copy of every tensor."""
    return {name: value.clone() for name, value in state.items()}


def narrow(state: Mapping[str, Tensor], rank: int) -> State:
    """The first ``rank`` directions: what a client of that rank starts from."""
    cut = {"lora_A": (slice(rank),), "lora_B": (slice(None), slice(rank))}
    return {name: value[cut[part_of(name)]] if part_of(name) in cut else value for name, value in state.items()}


def residual_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the residuals' factors."""
    return [name for name in state if part_of(name) in RESIDUAL]


def dense(state: Mapping[str, Tensor], module: str) -> Tensor:
    """B·A + residual of a module, [m, n] in float64."""
    return state[f"{module}.lora_B"].double() @ state[f"{module}.lora_A"].double() + dense_residual(state, module)


def dense_residual(state: Mapping[str, Tensor], module: str) -> Tensor:
    """The residual of a module, [m, n] in float64; zero if there is none. Raises Broken for half of one."""
    B, A = state.get(f"{module}.residual_B"), state.get(f"{module}.residual_A")
    if (B is None) != (A is None):
        raise Broken(f"{module} has only one factor of its residual")
    if B is None or A is None:
        return torch.zeros(state[f"{module}.lora_B"].shape[0], state[f"{module}.lora_A"].shape[1], dtype=torch.float64)
    return B.double() @ A.double()


def dense_mean(case: Case, module: str, ranks: str) -> tuple[Mean, float]:
    """The ingredients of a promise, and Σ p_k‖B_k·A_k‖, which says what size rounding errors have.

    ``ranks`` matters where a client holds fewer directions: with "held" the means are over what clients end with,
    padded with zeros; with "changes" what they change is added to the state. For equal ranks both are the same.
    """
    names = f"{module}.lora_B", f"{module}.lora_A"
    B, A = (case.state[name].double() for name in names)
    received = B @ A
    changed = ranks == "changes"
    mean = Mean(received, received.clone() if changed else torch.zeros_like(received), *_begin(B, A, changed))
    size = 0.0
    for client, update in case.updates.items():
        weight = case.weights[client]
        rank = min(
            [update[name].shape[axis] for name, axis in zip(names, (1, 0), strict=True) if name in update]
            + [A.shape[0]]
        )
        B0, A0 = B[:, :rank], A[:rank]
        dB, dA = (
            update[name].double() if name in update else torch.zeros_like(own)
            for name, own in zip(names, (B0, A0), strict=True)
        )
        own = (B0 + dB) @ (A0 + dA)
        size += weight * float(own.norm())
        mean.products.add_(weight * (own - B0 @ A0 if changed else own))
        mean.B[:, :rank].add_(weight * (dB if changed else B0 + dB))
        mean.A[:rank].add_(weight * (dA if changed else A0 + dA))
    return mean, size


def _begin(B: Tensor, A: Tensor, changed: bool) -> tuple[Tensor, Tensor]:
    return (B.clone(), A.clone()) if changed else (torch.zeros_like(B), torch.zeros_like(A))


def complaints(case: Case, after: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the names, shapes, dtypes and values of a returned state; residuals may come, grow and go."""
    own = {name: value for name, value in after.items() if part_of(name) not in RESIDUAL}
    wrong = [f"{name} (unknown)" for name in sorted(own.keys() - case.state.keys())]
    wrong += [f"{n} {tuple(v.shape)}" for n, v in own.items() if n in case.state and v.shape != case.state[n].shape]
    wrong += [f"{name} ({value.dtype})" for name, value in after.items() if value.dtype != torch.float32]
    wrong += [f"{name} (not finite)" for name, value in after.items() if not bool(torch.isfinite(value).all())]
    for module in {name.rpartition(".")[0] for name in after.keys() - own.keys()}:
        B, A = after.get(f"{module}.residual_B"), after.get(f"{module}.residual_A")
        outer = (
            (case.state[f"{module}.lora_B"].shape[0], case.state[f"{module}.lora_A"].shape[1])
            if module in modules(case.state)
            else ()
        )
        if (
            B is None
            or A is None
            or (B.ndim, A.ndim) != (2, 2)
            or B.shape[1] != A.shape[0]
            or (B.shape[0], A.shape[1]) != outer
        ):
            wrong.append(f"{module} (its residual does not fit)")
    return wrong


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ or that only one of the two has."""
    return [
        name for name in sorted(a.keys() | b.keys()) if name not in a or name not in b or not same(a[name], b[name])
    ]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.detach().contiguous().view(-1).view(torch.uint8).equal(b.detach().contiguous().view(-1).view(torch.uint8))


def largest(errors: list[float]) -> float:
    """The largest, NaN if one is NaN."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def none_wrong(wrong: list[str], count: int | None, verb: str, fine: str = "") -> Finding:
    """A finding about whole tensors: it holds if none is listed."""
    if not wrong:
        return Finding(True, fine or ("to the bit" if count is None else f"{count} tensors, to the bit"), 0.0)
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Finding(False, f"{wrong[0]}{more} {verb}", float(len(wrong)))
