"""Every strategy, one row each, against identities in float64 dense arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from fedlab.config import RunConfig
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
    exact: bool  # B·A after aggregation is Σ p_k B_k·A_k of what the clients trained


ROWS = [Row("fedavg", exact=False), Row("ffa", exact=True), Row("fedsvd", exact=True), Row("head", exact=True)]


def test_every_strategy_has_a_row():
    assert sorted(row.name for row in ROWS) == sorted(STRATEGIES)


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
    return state[f"{module}.lora_B"].double() @ state[f"{module}.lora_A"].double()


def applied(state: State, update: State) -> State:
    return {n: v.double() + update[n].double() if n in update else v.double() for n, v in state.items()}


WEIGHTS = {"client-0": 30, "client-1": 10, "client-2": 60}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
@pytest.mark.parametrize("kind", ["examples", "uniform"])
def test_effective_weights(row: Row, kind: str):
    strategy, state = make(row.name), start()
    updates, weights = drawn_updates(strategy, state, 3), client_weights(WEIGHTS, kind)
    after = strategy.aggregate(state, updates, weights, 1)
    locals_ = {c: applied(state, u) for c, u in updates.items()}
    for module in modules(state):
        exact = sum(weights[c] * product(locals_[c], module) for c in updates)
        factors = [sum(weights[c] * locals_[c][f"{module}.{part}"] for c in updates) for part in ("lora_B", "lora_A")]
        wanted = exact if row.exact else factors[0] @ factors[1]
        assert (product(after, module) - wanted).norm() < 1e-6 * wanted.norm()
        if not row.exact:
            assert (wanted - exact).norm() > 0.1 * exact.norm(), "the mean of products is another thing"
    wanted_head = sum(weights[c] * locals_[c]["head.w"] for c in updates)
    assert torch.allclose(after["head.w"].double(), wanted_head, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_one_client_is_the_identity(row: Row):
    strategy, state = make(row.name), start()
    updates = drawn_updates(strategy, state, 1)
    after, wanted = strategy.aggregate(state, updates, {"client-0": 1.0}, 1), applied(state, updates["client-0"])
    for module in modules(state):
        assert (product(after, module) - product(wanted, module)).norm() < 1e-6 * product(wanted, module).norm()


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_permuting_the_replies_changes_no_bit_and_nothing_is_edited_in_place(row: Row):
    strategy, state = make(row.name), start()
    before = {n: v.clone() for n, v in state.items()}
    updates, weights = drawn_updates(strategy, state, 3), client_weights(WEIGHTS, "examples")
    kept = {c: {n: v.clone() for n, v in u.items()} for c, u in updates.items()}
    after = strategy.aggregate(state, updates, weights, 1)
    again = strategy.aggregate(state, dict(reversed(list(updates.items()))), dict(reversed(list(weights.items()))), 1)
    assert all(torch.equal(after[n], again[n]) for n in state)
    assert all(torch.equal(state[n], before[n]) for n in state)
    assert all(torch.equal(updates[c][n], kept[c][n]) for c in updates for n in updates[c])


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_shapes_dtypes_and_what_is_frozen(row: Row):
    strategy, state = make(row.name), start()
    trained = strategy.trained_names(state)
    after = strategy.aggregate(state, drawn_updates(strategy, state, 3), client_weights(WEIGHTS, "uniform"), 1)
    assert {n: (v.shape, v.dtype) for n, v in after.items()} == {n: (v.shape, v.dtype) for n, v in state.items()}
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
