"""FlexLoRA's own options: the cut that is best where updates are large (``fisher``), and a mean that a minority cannot
steer (``mean``).
"""

from __future__ import annotations

import logging

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.state import State
from strategies import STRATEGIES
from strategies.base import Round

SHAPES = {"wide.q": (12, 20), "tall.v": (20, 12)}  # m × n
RANK = 3
WEIGHTS = {"client-0": 0.3, "client-1": 0.1, "client-2": 0.6}


def make(**options: str):
    text = f'[run]\nrounds=2\n[lora]\nrank={RANK}\nalpha=8\n[train]\nlr=1\nsteps=1\n[strategy]\nname="flexlora"\n'
    config = RunConfig.parse(text, [f"strategy.{k}={v}" for k, v in options.items()])
    return STRATEGIES["flexlora"](config)


def after_round(strategy, state: State, updates, weights, number: int = 1) -> State:
    """The state after a round of a server that remembers nothing yet."""
    return strategy.aggregate(state, strategy.init(state), updates, weights, Round(number))[0]


def drawn() -> tuple[State, dict[str, State]]:
    """A state, and updates whose rows of B differ in size by orders of magnitude."""
    g = torch.Generator().manual_seed(0)
    state: State = {"head.w": torch.randn(3, 5, generator=g)}
    for module, (m, n) in SHAPES.items():
        state[f"{module}.lora_A"] = torch.randn(RANK, n, generator=g)
        state[f"{module}.lora_B"] = torch.randn(m, RANK, generator=g)
    updates: dict[str, State] = {c: {n: torch.randn(v.shape, generator=g) for n, v in state.items()} for c in WEIGHTS}
    for module, (m, _) in SHAPES.items():
        size = torch.logspace(-2, 1, m)[:, None]
        for update in updates.values():
            update[f"{module}.lora_B"] = size * update[f"{module}.lora_B"]
    return state, updates


def errors(after: State, state: State, updates: dict[str, State]) -> list[float]:
    """Per module, the error against the mean of the products under the weights Σ p_k Σ_j ΔB_ij², densely in float64."""
    found = []
    for module in SHAPES:
        B, A = f"{module}.lora_B", f"{module}.lora_A"
        exact = sum(
            p * (state[B].double() + updates[c][B]) @ (state[A].double() + updates[c][A]) for c, p in WEIGHTS.items()
        )
        rows = sum(p * updates[c][B].double().square().sum(1, keepdim=True) for c, p in WEIGHTS.items())
        found.append(float((rows.sqrt() * (exact - after[B].double() @ after[A].double())).norm()))
    return found


@pytest.mark.parametrize("split", ["sqrt", "left"])
def test_it_lowers_the_error_where_updates_are_large(split: str):
    state, updates = drawn()
    plain = after_round(make(split=split), state, updates, WEIGHTS, 1)
    weighted = after_round(make(split=split, fisher="updates"), state, updates, WEIGHTS, 1)
    for before, after in zip(errors(plain, state, updates), errors(weighted, state, updates), strict=True):
        assert after < 0.95 * before
    assert torch.equal(plain["head.w"], weighted["head.w"])
    assert {n: (v.shape, v.dtype) for n, v in weighted.items()} == {n: (v.shape, v.dtype) for n, v in state.items()}


@pytest.mark.parametrize("fisher", ["none", "updates"])
@pytest.mark.parametrize("split", ["sqrt", "left"])
def test_the_singular_values_go_where_the_split_says(split: str, fisher: str):
    """Evenly to both factors, or all to B: A's rows are then orthonormal. Of the weighted cut they are X's own."""
    state, updates = drawn()
    after = after_round(make(split=split, fisher=fisher), state, updates, WEIGHTS, 1)
    for module in SHAPES:
        B, A = after[f"{module}.lora_B"].double(), after[f"{module}.lora_A"].double()
        size = torch.linalg.svdvals(B @ A)[:RANK]
        right = size if split == "sqrt" else torch.ones_like(size)
        left = size if split == "sqrt" else size.square()
        torch.testing.assert_close(A @ A.T, right.diag(), rtol=1e-4, atol=1e-4 * float(right.max()))
        torch.testing.assert_close(B.T @ B, left.diag(), rtol=1e-4, atol=1e-4 * float(left.max()))


def test_none_is_the_default():
    state, updates = drawn()
    first, second = (after_round(make(**o), state, updates, WEIGHTS, 1) for o in ({}, {"fisher": "none"}))
    assert all(torch.equal(first[n], second[n]) for n in state)


def test_permuting_the_clients_changes_no_bit():
    state, updates = drawn()
    strategy = make(fisher="updates")
    first = after_round(strategy, state, updates, WEIGHTS, 1)
    again = after_round(strategy, state, dict(reversed(updates.items())), dict(reversed(WEIGHTS.items())), 1)
    assert all(torch.equal(first[n], again[n]) for n in state)


def test_rows_that_all_weigh_the_same_fall_back_to_the_plain_svd_and_are_logged_once(caplog: pytest.LogCaptureFixture):
    state, updates = drawn()
    for update in updates.values():
        update["wide.q.lora_B"] = torch.zeros_like(update["wide.q.lora_B"])
        update["tall.v.lora_B"] = torch.ones_like(update["tall.v.lora_B"])
    strategy = make(fisher="updates")
    with caplog.at_level(logging.INFO, logger="fedlab"):
        for number in (1, 2):
            weighted = after_round(strategy, state, updates, WEIGHTS, number)
    told = [r.getMessage() for r in caplog.records if "plain SVD" in r.getMessage()]
    assert told == ['tall.v, wide.q: the updates weigh all rows alike; fisher = "updates" is the plain SVD there']
    plain = after_round(make(), state, updates, WEIGHTS, 1)
    assert all(torch.equal(plain[n], weighted[n]) for n in state)


def test_other_values_are_refused():
    with pytest.raises((ConfigError, ValueError), match="fisher"):
        make(fisher="gradients")


def test_a_robust_mean_of_products_survives_a_minority_that_flips_its_sign():
    """Ten clients near one product, three of them send minus ten times theirs; factors differ, since every client has
    its own basis.
    """
    g = torch.Generator().manual_seed(0)
    state = {n: torch.zeros_like(v) for n, v in drawn()[0].items()}
    common = {
        m: (torch.randn(shape[0], RANK, generator=g), torch.randn(RANK, shape[1], generator=g))
        for m, shape in SHAPES.items()
    }
    updates: dict[str, State] = {}
    for i in range(10):
        mix = torch.linalg.qr(torch.randn(RANK, RANK, generator=g)).Q
        own: State = {"head.w": 1 + 0.1 * torch.randn(3, 5, generator=g)}
        for module, (B, A) in common.items():
            own[f"{module}.lora_B"] = (B + 0.01 * torch.randn(B.shape, generator=g)) @ mix
            own[f"{module}.lora_A"] = mix.T @ (A + 0.01 * torch.randn(A.shape, generator=g))
        if i < 3:
            own = {n: v if n.endswith("lora_A") else -10 * v for n, v in own.items()}
        updates[f"client-{i}"] = own
    weights = dict.fromkeys(updates, 0.1)
    found = {mean: after_round(make(mean=mean), state, updates, weights, 1) for mean in ("weighted", "robust")}
    for module, (B, A) in common.items():
        honest = B.double() @ A.double()
        error = {
            k: float((v[f"{module}.lora_B"].double() @ v[f"{module}.lora_A"].double() - honest).norm() / honest.norm())
            for k, v in found.items()
        }
        assert error["robust"] < 0.05
        assert error["weighted"] > 1
    assert (found["robust"]["head.w"] - 1).abs().max() < 0.3
    assert (found["weighted"]["head.w"] - 1).abs().max() > 1
