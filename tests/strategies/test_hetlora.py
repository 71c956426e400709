"""HetLoRA's own rules: norm weights, padding of factors, pruning; LoRA-FAIR's optimality."""

from __future__ import annotations

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.exact import corrected_b
from fedlab.lora.state import State
from strategies import STRATEGIES
from strategies.base import Round

RANKS = {"client-0": 4, "client-1": 2, "client-2": 1}
WEIGHTS = {"client-0": 0.2, "client-1": 0.5, "client-2": 0.3}
SHAPES = {"wide": (6, 11), "tall": (11, 6)}


def make(name: str, *overrides: str):
    text = "[run]\nrounds=3\n[lora]\nrank=4\nalpha=8\n[data]\nclients=3\n[train]\nlr=1\nsteps=1\n"
    text += f'[strategy]\nname="{name}"\n'
    config = RunConfig.parse(text, overrides)
    return STRATEGIES[name](config)


def after_round(strategy, state: State, updates, weights, number: int = 1) -> State:
    """The state after a round of a server that remembers nothing yet."""
    return strategy.aggregate(state, strategy.init(state), updates, weights, Round(number))[0]


def start(rank: int = 4) -> State:
    g = torch.Generator().manual_seed(0)
    state = {"head.w": torch.randn(2, 3, generator=g)}
    for module, (m, n) in SHAPES.items():
        state |= {
            f"{module}.lora_A": torch.randn(rank, n, generator=g),
            f"{module}.lora_B": torch.randn(m, rank, generator=g),
        }
    return state


def updates_of(ranks: dict[str, int], scale: float = 1.0) -> dict[str, State]:
    g = torch.Generator().manual_seed(1)
    return {c: {n: scale * torch.randn(v.shape, generator=g) for n, v in start(r).items()} for c, r in ranks.items()}


def held(state: State, update: State, module: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense zero-padded factors that a client ends with, float64."""
    m, n = SHAPES[module]
    B, A = torch.zeros(m, 4, dtype=torch.float64), torch.zeros(4, n, dtype=torch.float64)
    B[:, :rank] = state[f"{module}.lora_B"].double()[:, :rank] + update[f"{module}.lora_B"].double()
    A[:rank] = state[f"{module}.lora_A"].double()[:rank] + update[f"{module}.lora_A"].double()
    return B, A


@pytest.mark.parametrize("by_norm", [True, False])
def test_padded_factors_are_averaged_with_the_weights_that_are_claimed(by_norm: bool):
    strategy, state, updates = (
        make("hetlora", f"strategy.norm_weights={str(by_norm).lower()}"),
        start(),
        updates_of(RANKS),
    )
    after = after_round(strategy, state, updates, WEIGHTS, 1)
    factors = {c: {module: held(state, updates[c], module, r) for module in SHAPES} for c, r in RANKS.items()}
    norms = {c: sum((B @ A).square().sum() for B, A in own.values()).sqrt() for c, own in factors.items()}
    weights = {c: float(norms[c] / sum(norms.values())) for c in RANKS} if by_norm else WEIGHTS
    for module in SHAPES:
        for i, part in enumerate(("lora_B", "lora_A")):
            wanted = sum(weights[c] * factors[c][module][i] for c in RANKS)
            assert torch.allclose(after[f"{module}.{part}"].double(), wanted, rtol=1e-6, atol=1e-6)
    head = state["head.w"].double() + sum(WEIGHTS[c] * updates[c]["head.w"].double() for c in RANKS)
    assert torch.allclose(after["head.w"].double(), head, atol=1e-6)


def test_zero_products_fall_back_to_the_usual_weights():
    strategy, state, updates = make("hetlora"), start(), updates_of(RANKS)
    state |= {n: torch.zeros_like(v) for n, v in state.items() if n.endswith("lora_B")}
    updates = {
        c: {n: torch.zeros_like(v) if n.endswith("lora_B") else v for n, v in u.items()} for c, u in updates.items()
    }
    after = after_round(strategy, state, updates, WEIGHTS, 1)
    assert all(bool(torch.isfinite(v).all()) for v in after.values())
    A = sum(WEIGHTS[c] * held(state, updates[c], "wide", r)[1] for c, r in RANKS.items())
    assert torch.allclose(after["wide.lora_A"].double(), A, atol=1e-6)


def test_a_client_whose_tail_shrinks_is_pruned_and_another_is_not():
    strategy, state = make("hetlora", "strategy.prune=0.5"), start()
    updates = {c: {n: torch.zeros_like(v) for n, v in start().items()} for c in ("client-0", "client-1")}
    for module in SHAPES:
        updates["client-0"][f"{module}.lora_B"][:, 2:] = -0.5 * state[f"{module}.lora_B"][:, 2:]
        updates["client-1"][f"{module}.lora_B"][:, 2:] = 0.5 * state[f"{module}.lora_B"][:, 2:]
    weights, none = {"client-0": 0.5, "client-1": 0.5}, strategy.init(state)
    _, kept = strategy.aggregate(state, none, updates, weights, Round(1))
    assert strategy.client_ranks(kept) == {"client-0": 2}
    assert strategy.client_ranks(none) == {}, "what went in is as it was"
    floor = make("hetlora", "strategy.prune=0.1", "strategy.min_rank=3")
    _, kept = floor.aggregate(state, floor.init(state), updates, weights, Round(1))
    assert floor.client_ranks(kept) == {"client-0": 3}


@pytest.mark.parametrize("module", SHAPES)
def test_lora_fair_is_the_best_in_the_row_space_of_the_mean_a(module: str):
    """Against the dense projection D·A⁺·A in float64, and against random corrections."""
    strategy, state = make("lora-fair"), start()
    updates = updates_of(dict.fromkeys(RANKS, 4))
    after = after_round(strategy, state, updates, WEIGHTS, 1)
    pairs = {c: held(state, updates[c], module, 4) for c in RANKS}
    D = sum(WEIGHTS[c] * B @ A for c, (B, A) in pairs.items())
    A = sum(WEIGHTS[c] * pair[1] for c, pair in pairs.items())
    assert torch.allclose(after[f"{module}.lora_A"].double(), A, atol=1e-6)
    found = after[f"{module}.lora_B"].double() @ after[f"{module}.lora_A"].double()
    best = D @ torch.linalg.pinv(A) @ A
    assert (found - best).norm() < 2e-5 * best.norm()
    plain = sum(WEIGHTS[c] * pair[0] for c, pair in pairs.items()) @ A
    assert (found - D).norm() < 0.9 * (plain - D).norm(), "closer than the product of means"
    g = torch.Generator().manual_seed(5)
    for _ in range(50):
        other = found + 0.1 * torch.randn(SHAPES[module][0], 4, generator=g, dtype=torch.float64) @ A
        assert (found - D).norm() <= (other - D).norm()


def test_the_correction_with_a_large_ridge_is_none_and_solves_its_own_equation():
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(7, 3, generator=g, dtype=torch.float64), torch.randn(3, 9, generator=g, dtype=torch.float64)
    pairs = [(torch.randn(7, 3, generator=g), torch.randn(3, 9, generator=g)) for _ in range(2)]
    D = sum(0.5 * b.double() @ a.double() for b, a in pairs)
    assert torch.allclose(corrected_b(B, A, pairs, [0.5, 0.5], 1e9), B, atol=1e-6)
    for ridge in (1e-3, 1.0):
        change = corrected_b(B, A, pairs, [0.5, 0.5], ridge) - B
        lam = ridge * float(torch.trace(A @ A.mT)) / 3
        assert torch.allclose(
            ((B + change) @ A - D) @ A.mT + lam * change, torch.zeros(7, 3, dtype=torch.float64), atol=1e-9
        )
    assert torch.equal(corrected_b(B, torch.zeros(3, 9), pairs, [0.5, 0.5], 1.0), B)
    with pytest.raises(ValueError, match="ridge"):
        corrected_b(B, A, pairs, [0.5, 0.5], 0.0)


@pytest.mark.parametrize("name", ["fedex", "lora-fair"])
def test_unequal_ranks_are_refused_where_the_rule_has_no_place_for_them(name: str):
    with pytest.raises(ConfigError, match="needs equal ranks"):
        make(name, "clients.rank={client-1=2}")
