"""Every strategy, one row each, against identities in float64 dense arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.average import client_weights
from fedlab.lora.state import State, modules
from strategies import STRATEGIES
from strategies.federation import Federation

SHAPES = {"wide.q": (12, 20), "tall.v": (20, 12), "square.k": (16, 16)}  # m × n
RANK = 4


@dataclass(frozen=True)
class Row:
    """What a strategy promises about the averaged effective weight change."""

    name: str
    effective: str  # after aggregation: "mean of products" Σ p_k B_k·A_k, exactly; "product of means" B̄·Ā; "best of rank r" of the former
    options: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"{k}={v}" for k, v in self.options)])


EXACT, FACTORS, BEST = "mean of products", "product of means", "best of rank r"
ROWS = [
    Row("fedavg", FACTORS),
    Row("ffa", EXACT),
    Row("fedsvd", EXACT),
    Row("fedsvd", EXACT, (("refresh", "{every=1, keep=1}"),)),
    Row("fedex", EXACT),
    Row("flora", EXACT),
    Row("flora", EXACT, (("train", "B"),)),
    Row("flexlora", BEST),
    Row("flexlora", BEST, (("split", "left"),)),
    Row("rolora", EXACT),
    Row("head", EXACT),
]


def test_every_strategy_has_a_row():
    assert {row.name for row in ROWS} == set(STRATEGIES)


def make(name: str, **options):
    text = f'[run]\nrounds=2\n[lora]\nrank={RANK}\nalpha=8\n[train]\nlr=1\nsteps=1\n[strategy]\nname="{name}"\n'
    config = RunConfig.parse(text, [f"strategy.{k}={v}" for k, v in options.items()])
    return STRATEGIES[name](config, Federation(config, {}, {}, []))


def start() -> State:
    g = torch.Generator().manual_seed(0)
    state = {"head.w": torch.randn(3, 5, generator=g)}
    for module, (m, n) in SHAPES.items():
        state[f"{module}.lora_A"] = torch.randn(RANK, n, generator=g)
        state[f"{module}.lora_B"] = torch.randn(m, RANK, generator=g)
    return state


def drawn_updates(strategy, state: State, clients: int) -> dict[str, State]:
    g = torch.Generator().manual_seed(1)
    names = strategy.trained_names(state)
    return {f"client-{i}": {n: torch.randn(state[n].shape, generator=g) for n in names} for i in range(clients)}


def product(state: State, module: str) -> torch.Tensor:
    """B·A and the residual: what is added to the weight, apart from the scale."""
    delta = state[f"{module}.lora_B"].double() @ state[f"{module}.lora_A"].double()
    if f"{module}.residual_B" in state:
        delta = delta + state[f"{module}.residual_B"].double() @ state[f"{module}.residual_A"].double()
    return delta


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Best approximation of a rank, by dense SVD."""
    U, S, Vt = torch.linalg.svd(matrix)
    return U[:, :rank] @ torch.diag(S[:rank]) @ Vt[:rank]


def applied(state: State, update: State) -> State:
    return {n: v.double() + update[n].double() if n in update else v.double() for n, v in state.items()}


WEIGHTS = {"client-0": 30, "client-1": 10, "client-2": 60}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.title)
@pytest.mark.parametrize("kind", ["examples", "uniform"])
def test_effective_weights(row: Row, kind: str):
    strategy, state = make(row.name, **dict(row.options)), start()
    updates, weights = drawn_updates(strategy, state, 3), client_weights(WEIGHTS, kind)
    after = strategy.aggregate(state, updates, weights, 1)
    locals_ = {c: applied(state, u) for c, u in updates.items()}
    for module in modules(state):
        exact = sum(weights[c] * product(locals_[c], module) for c in updates)
        factors = [sum(weights[c] * locals_[c][f"{module}.{part}"] for c in updates) for part in ("lora_B", "lora_A")]
        wanted = {EXACT: exact, FACTORS: factors[0] @ factors[1], BEST: best(exact, RANK)}[row.effective]
        assert (product(after, module) - wanted).norm() < 1e-6 * wanted.norm()
        if row.effective == FACTORS:
            assert (wanted - exact).norm() > 0.1 * exact.norm(), "the mean of products is another thing"
    wanted_head = sum(weights[c] * locals_[c]["head.w"] for c in updates)
    assert torch.allclose(after["head.w"].double(), wanted_head, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.title)
def test_one_client_is_the_identity(row: Row):
    strategy, state = make(row.name, **dict(row.options)), start()
    updates = drawn_updates(strategy, state, 1)
    after, wanted = strategy.aggregate(state, updates, {"client-0": 1.0}, 1), applied(state, updates["client-0"])
    for module in modules(state):
        assert (product(after, module) - product(wanted, module)).norm() < 1e-6 * product(wanted, module).norm()


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.title)
def test_permuting_the_replies_changes_no_bit_and_nothing_is_edited_in_place(row: Row):
    strategy, state = make(row.name, **dict(row.options)), start()
    before = {n: v.clone() for n, v in state.items()}
    updates, weights = drawn_updates(strategy, state, 3), client_weights(WEIGHTS, "examples")
    kept = {c: {n: v.clone() for n, v in u.items()} for c, u in updates.items()}
    after = strategy.aggregate(state, updates, weights, 1)
    again = strategy.aggregate(state, dict(reversed(list(updates.items()))), dict(reversed(list(weights.items()))), 1)
    assert all(torch.equal(after[n], again[n]) for n in state)
    assert all(torch.equal(state[n], before[n]) for n in state)
    assert all(torch.equal(updates[c][n], kept[c][n]) for c in updates for n in updates[c])


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.title)
def test_shapes_dtypes_and_what_is_frozen(row: Row):
    strategy, state = make(row.name, **dict(row.options)), start()
    trained = strategy.trained_names(state)
    after = strategy.aggregate(state, drawn_updates(strategy, state, 3), client_weights(WEIGHTS, "uniform"), 1)
    own = {n: v for n, v in after.items() if ".residual_" not in n}
    assert {n: (v.shape, v.dtype) for n, v in own.items()} == {n: (v.shape, v.dtype) for n, v in state.items()}
    assert all(v.dtype == torch.float32 for v in after.values())
    if row.name in ("ffa", "head"):
        assert all(torch.equal(after[n], state[n]) for n in state if n not in trained)


def test_head_policy_follows_the_configuration():
    strategy, state = make("fedsvd"), start()
    assert "head.w" in strategy.trained_names(state)
    object.__setattr__(strategy.config.train, "head", "freeze")
    assert "head.w" not in strategy.trained_names(state)


def test_fedsvd_period_and_warmup():
    def orthonormal_after(round_number: int, **options) -> bool:
        strategy, state = make("fedsvd", **options), start()
        A = strategy.aggregate(state, drawn_updates(strategy, state, 2), {"client-0": 0.5, "client-1": 0.5}, round_number)["wide.q.lora_A"]
        return bool(torch.allclose(A @ A.T, torch.eye(RANK), atol=1e-5))

    assert [orthonormal_after(r) for r in (1, 2, 3)] == [True, True, True]
    assert [orthonormal_after(r, period=2) for r in (1, 2, 3, 4)] == [False, True, False, True]
    assert [orthonormal_after(r, warmup=2) for r in (1, 2, 3)] == [False, False, True]


FOLDING = [row for row in ROWS if row.name in ("fedex", "flora") or "refresh" in row.title]


@pytest.mark.parametrize("row", FOLDING, ids=lambda r: r.title)
def test_residuals_add_up_over_rounds_and_nothing_is_lost(row: Row):
    """Three rounds from a start with B = 0: the effective change is the sum of what each round's clients did, in float64."""
    strategy, state = make(row.name, **dict(row.options)), start()
    state |= {n: torch.zeros_like(v) for n, v in state.items() if n.endswith("lora_B")}
    weights = client_weights(WEIGHTS, "examples")
    for number in (1, 2, 3):
        g = torch.Generator().manual_seed(number)
        updates = {c: {n: torch.randn(state[n].shape, generator=g) for n in strategy.trained_names(state, number)} for c in WEIGHTS}
        wanted = {}
        for module in modules(state):
            before = product(state, module) - state[f"{module}.lora_B"].double() @ state[f"{module}.lora_A"].double()
            locals_ = {c: applied(state, u) for c, u in updates.items()}
            wanted[module] = before + sum(weights[c] * locals_[c][f"{module}.lora_B"] @ locals_[c][f"{module}.lora_A"] for c in updates)
        state = strategy.aggregate(state, updates, weights, number)
        for module in modules(state):
            assert (product(state, module) - wanted[module]).norm() < 2e-6 * wanted[module].norm()
            m, n = SHAPES[module]
            assert state[f"{module}.residual_B"].shape[1] <= min(m, n), "a residual never has more directions than there are"


def test_flora_begins_every_round_with_a_new_adapter_that_does_nothing():
    strategy, state = make("flora"), start()
    weights = client_weights(WEIGHTS, "uniform")
    after = strategy.aggregate(state, drawn_updates(strategy, state, 3), weights, 1)
    again = strategy.aggregate(after, drawn_updates(strategy, after, 3), weights, 2)
    for module in modules(state):
        assert not after[f"{module}.lora_B"].any()
        A1, A2 = after[f"{module}.lora_A"].double(), again[f"{module}.lora_A"].double()
        assert torch.allclose(A1 @ A1.T, torch.eye(RANK, dtype=torch.float64), atol=1e-6)
        assert float(torch.linalg.matrix_norm(A1 @ A2.T, 2)) < 0.999, "another subspace"


def test_rolora_alternates_and_begins_with_b():
    strategy, state = make("rolora"), start()
    parts = [{n.rpartition(".")[2] for n in strategy.trained_names(state, r) if ".lora_" in n} for r in (1, 2, 3)]
    assert parts == [{"lora_B"}, {"lora_A"}, {"lora_B"}]
    assert strategy.trained_parts(strategy.config) == ["head", "lora_A", "lora_B"], "a privacy plan covers both"


def test_a_refreshed_fedsvd_keeps_the_largest_directions_and_opens_orthonormal_ones():
    strategy, state = make("fedsvd", refresh="{every=2, keep=2}"), start()
    weights = client_weights(WEIGHTS, "uniform")
    first = strategy.aggregate(state, drawn_updates(strategy, state, 3), weights, 1)
    assert not [n for n in first if "residual" in n]
    second = strategy.aggregate(first, drawn_updates(strategy, first, 3), weights, 2)
    for module in modules(state):
        A, B = second[f"{module}.lora_A"].double(), second[f"{module}.lora_B"]
        assert torch.allclose(A @ A.T, torch.eye(RANK, dtype=torch.float64), atol=1e-6)
        assert B[:, :2].any()
        assert not B[:, 2:].any()
        assert second[f"{module}.residual_B"].shape[1] == 2


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("fedex", ['run.dtype="bfloat16"'], "round away"),
        ("flora", ['run.dtype="bfloat16"'], "round away"),
        ("fedsvd", ['run.dtype="bfloat16"', "strategy.refresh={every=1}"], "round away"),
        ("fedsvd", ["strategy.refresh={every=1, keep=4}"], "leaves nothing to refresh"),
        ("fedex", ["privacy={unit='client', sigma=1.0, clip=1.0}", "strategy.weights=uniform"], "noises one mean"),
    ],
)
def test_meaningless_combinations_are_refused_with_the_reason(name: str, overrides: list[str], reason: str):
    text = f'[run]\nrounds=2\n[lora]\nrank={RANK}\nalpha=8\n[train]\nlr=1\nsteps=1\n[strategy]\nname="{name}"\n'
    config = RunConfig.parse(text, overrides)
    with pytest.raises(ConfigError, match=reason):
        STRATEGIES[name](config, Federation(config, {}, {}, []))
