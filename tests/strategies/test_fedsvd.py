"""When FedSVD turns its basis, and what of the server's momentum goes on in the new one."""

from __future__ import annotations

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.lora.state import State
from strategies.base import Round, ServerState
from strategies.fedsvd import FedSVD

TEXT = "[run]\nrounds = 9\n[lora]\nrank = 4\nalpha = 8\n[train]\nlr = 1\nsteps = 1\n[strategy]\nname = 'fedsvd'\n"


def strategy(*overrides: str) -> FedSVD:
    return FedSVD(RunConfig.parse(TEXT, overrides))


def start() -> State:
    g = torch.Generator().manual_seed(0)
    return {"q.lora_A": torch.randn(4, 9, generator=g), "q.lora_B": torch.randn(7, 4, generator=g)}


def one_round(made: FedSVD, state: State, server_state: ServerState, number: int) -> tuple[State, ServerState]:
    g = torch.Generator().manual_seed(number)
    updates = {f"client-{i}": {"q.lora_B": torch.randn(7, 4, generator=g)} for i in range(2)}
    return made.aggregate(state, server_state, updates, {"client-0": 0.5, "client-1": 0.5}, Round(number))


def turned(*overrides: str) -> list[int]:
    """The rounds of nine after which A is another one."""
    made, state, rounds = strategy(*overrides), start(), []
    server_state = made.init(state)
    for number in range(1, 10):
        after, server_state = one_round(made, state, server_state, number)
        if not torch.equal(after["q.lora_A"], state["q.lora_A"]):
            rounds.append(number)
            torch.testing.assert_close(after["q.lora_A"] @ after["q.lora_A"].T, torch.eye(4), rtol=0, atol=1e-5)
        state = after
    return rounds


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        ([], [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (["strategy.period=3"], [3, 6, 9]),
        (["strategy.warmup=4"], [5, 6, 7, 8, 9]),
        (["strategy.period=2", "strategy.warmup=4"], [6, 8]),
    ],
)
def test_the_basis_turns_after_the_warmup_and_every_period(options: list[str], rounds: list[int]):
    assert turned(*options) == rounds


def test_directions_that_were_folded_away_leave_no_momentum_behind():
    """New directions begin at rest; those that are kept go on."""
    made = strategy("strategy.server={optimizer='momentum', beta1=0.9}", "strategy.refresh={every=2, keep=1}")
    state, server_state = one_round(made, start(), {}, 1)
    assert server_state["first/q.lora_B"].any(0).all()
    state, server_state = one_round(made, state, server_state, 2)
    moving = server_state["first/q.lora_B"].any(0).tolist()
    assert moving == [True, False, False, False]
    assert state["q.lora_B"].any(0).tolist() == [True, False, False, False]
