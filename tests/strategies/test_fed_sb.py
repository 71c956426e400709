"""Fed-SB in a real model: fixed bases of the base's weights, a core of r² numbers, and an adapter that peft loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.state import BASIS, effective_delta, modules
from fedlab.models.adapters import initial_state
from fedlab.models.plain import load_run
from fedlab.session import open_session
from strategies.base import Round
from strategies.fed_sb import FedSB

SB = ["strategy.name=fed-sb", "train.lr=2.0"]


def begun(toml: str, *more: str):
    config = RunConfig.parse(toml, [*SB, *more])
    model = open_session(config.to_toml()).model
    strategy = FedSB(config, model)
    return model, strategy, strategy.begin_task(initial_state(model, config.lora, 0), {}, 0)


def test_the_bases_are_the_base_s_leading_singular_vectors_and_nothing_changes_yet(tiny_toml: str):
    model, strategy, state = begun(tiny_toml)
    rank = strategy.config.lora.rank
    for module in modules(state):
        S = torch.linalg.svdvals(model.pristine(module))
        left, right = state[f"{module}.{BASIS}"].double(), state[f"{module}.lora_A"].double()
        assert state[f"{module}.lora_B"].shape == (rank, rank)
        core = left @ model.pristine(module) @ right.mT
        torch.testing.assert_close(core, torch.diag(S[:rank]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left @ left.mT, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)
        assert not bool(effective_delta(state, module, 1.0).any())
    trained = sum(state[name].numel() for name in strategy.trained_names(state) if not name.startswith("head."))
    assert trained == rank * rank * len(modules(state))


def test_the_mean_of_the_cores_is_the_mean_of_the_weight_changes(tiny_toml: str):
    _, strategy, state = begun(tiny_toml)
    g = torch.Generator().manual_seed(1)
    names, weights = strategy.sent_names(state), {"client-0": 0.25, "client-1": 0.75}
    updates = {client: {n: torch.randn(state[n].shape, generator=g) for n in names} for client in weights}
    after, _ = strategy.aggregate(state, {}, updates, weights, Round(1))
    for module in modules(state):
        each = {
            c: effective_delta(state | {n: state[n] + v for n, v in update.items()}, module, 1.0).double()
            for c, update in updates.items()
        }
        wanted = sum(weight * each[client] for client, weight in weights.items())
        torch.testing.assert_close(effective_delta(after, module, 1.0).double(), wanted, rtol=0, atol=1e-5)


def test_a_run_ends_with_an_adapter_that_peft_loads(tiny_toml: str, tmp_path: Path):
    result = fedlab.simulate(RunConfig.parse(tiny_toml, SB), tmp_path / "run", quiet=True).result
    assert result["status"] == "completed"
    load_run(tmp_path / "run")  # held against what the run scored before it ended
    assert result["bytes_up"] < 3 * 3 * 4 * 2000, "cores travel, not factors"


def test_what_it_cannot_do_is_refused(tiny_toml: str):
    with pytest.raises(ConfigError, match=r'needs train\.gradients = "fused"'):
        FedSB(RunConfig.parse(tiny_toml, [*SB, "train.gradients=hooks"]))
    with pytest.raises(ConfigError, match="its bases stay for ever"):
        FedSB(RunConfig.parse(tiny_toml + "[[tasks]]\nname='one'\n[[tasks]]\nname='two'\n", SB))
