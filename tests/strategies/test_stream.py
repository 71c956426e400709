"""What strategies for streams share: what is protected of a released sum, and what goes from task to task."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.continual.sketch import privatise
from fedlab.continual.subspace import CapacityExhausted
from fedlab.lora.state import State
from fedlab.privacy.noise import SeededNoise
from strategies import STRATEGIES
from strategies.stream import InputsOptions, carried, grown, merged, protected

SIGMA, CLIP, N = 1.5, 0.4, 60
TEXT = "[run]\nrounds = 2\n[lora]\nrank = 2\nalpha = 4\n[train]\nlr = 0.1\nsteps = 1\n"
TEXT += "[[tasks]]\nname = 'a'\n[[tasks]]\nname = 'b'\n"
STATE: State = {"m.lora_A": torch.zeros(2, N), "m.lora_B": torch.zeros(5, 2)}


@cache
def config(clients: int, privacy: str = "{unit='example', sigma=1.0, clip=1.0}") -> RunConfig:
    settings = [f"data.clients={clients}", f"privacy={privacy}", "strategy.name=osft-data"]
    return RunConfig.parse(TEXT, settings)


def options(**keys: object) -> InputsOptions:
    return InputsOptions(**{"gram": {"sigma": SIGMA, "clip": CLIP}, "energy": 0.98, "free": 4, **keys})


def noises(clients: int, seed: int = 0) -> Tensor:
    """What so many clients' releases of nothing add up to."""
    noise = SeededNoise(np.random.default_rng(seed))
    return sum(
        (privatise({"m": torch.zeros(N, N)}, SIGMA, CLIP, noise)["m"] for _ in range(clients)),
        torch.zeros(N, N).double(),
    )


@pytest.mark.parametrize("clients", [2, 9, 36])
def test_the_noise_of_all_clients_together_is_taken_for_no_input(clients: int):
    assert len(grown(config(clients), options(), STATE, {}, {"m": noises(clients)})["m.protected"]) == 0


def test_an_input_above_the_noise_is_protected_and_kept():
    one = torch.nn.functional.one_hot(torch.tensor(7), N).double()
    gram = noises(9) + 500 * torch.outer(one, one)
    rows = grown(config(9), options(), STATE, {}, {"m": gram})["m.protected"]
    assert len(rows) == 1
    assert abs(float(rows[0].double() @ one)) > 0.99
    other = torch.nn.functional.one_hot(torch.tensor(3), N).double()
    both = grown(config(9), options(), STATE, {"m.protected": rows}, {"m": noises(9) + 500 * torch.outer(other, other)})
    assert torch.equal(both["m.protected"][:1], rows), "those of earlier tasks stay as they are"
    assert abs(float(both["m.protected"][1].double() @ other)) > 0.99
    assert torch.equal(grown(config(9), options(), STATE, {"m.protected": rows}, {})["m.protected"], rows)


@pytest.mark.parametrize(("free", "left"), [(4, 4), (1, 2)])
def test_enough_directions_are_left_for_the_adapter(free: int, left: int):
    """At least ``free``, and never fewer than the adapter's rank; one input more ends the stream."""
    plain, every = config(9, "{unit='none'}"), options(free=free, energy=1.0)
    used = (torch.arange(N) < N - left).double()
    assert len(grown(plain, every, STATE, {}, {"m": used.diag()})["m.protected"]) == N - left
    used[-1] = 1.0
    with pytest.raises(CapacityExhausted, match=f"{N - left} may be"):
        grown(plain, every, STATE, {}, {"m": used.diag()})


def test_what_a_task_taught_goes_on_in_the_residual_and_the_heads_stay():
    state = {
        "m.lora_A": torch.randn(2, N, generator=torch.Generator().manual_seed(0)),
        "m.lora_B": torch.randn(5, 2, generator=torch.Generator().manual_seed(1)),
        "head.weight": torch.ones(3, 5),
    }
    memory = merged(state)
    assert sorted(memory) == ["head.weight", "m.residual_A", "m.residual_B"]
    torch.testing.assert_close(memory["m.residual_B"] @ memory["m.residual_A"], state["m.lora_B"] @ state["m.lora_A"])
    again = merged(carried(state, memory))
    torch.testing.assert_close(
        again["m.residual_B"] @ again["m.residual_A"], 2 * state["m.lora_B"] @ state["m.lora_A"], rtol=1e-4, atol=1e-5
    )
    assert protected({}, state, "m").shape == (0, N)


@pytest.mark.parametrize("name", ["osft-data", "fedsvd-continual"])
def test_a_task_starts_where_no_protected_input_is_read(name: str):
    strategy = STRATEGIES[name](RunConfig.parse(TEXT, [f"strategy.name={name}", "data.clients=9"]))
    rows = torch.linalg.qr(torch.randn(N, 10, generator=torch.Generator().manual_seed(2)))[0].T.contiguous()
    state = strategy.begin_task(dict(STATE), {"m.protected": rows, "head.weight": torch.ones(3, 5)}, 1)
    A = state["m.lora_A"]
    assert float((A @ rows.T).abs().max()) < 1e-5
    torch.testing.assert_close(A @ A.T, torch.eye(len(A)), rtol=0, atol=1e-5)
    assert not state["m.lora_B"].any()
    assert state["m.lora_B"].shape == (5, len(A))
    assert torch.equal(state["head.weight"], torch.ones(3, 5))
