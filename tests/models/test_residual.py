"""A residual that clients carry: taken out of the base to the bit, and refused where it has no place.

That it counts, in the model and in the adapter on disk, is shown for every strategy in
tests/strategies/test_conformance.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlab.config import RunConfig
from fedlab.lora.state import modules, with_residual
from fedlab.models.adapters import initial_state
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import _build, build
from fedlab.objectives import Classification


def config(model: Path, *overrides: str) -> RunConfig:
    text = f'[run]\nrounds=1\n[model]\nname="{model}"\n[lora]\nrank=4\nalpha=8\n[train]\nlr=1\nsteps=1\n'
    return RunConfig.parse(text, overrides)


def random_state(loaded: LoadedModel, settings: RunConfig, k: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    state = {n: torch.randn(v.shape, generator=g) * 0.1 for n, v in initial_state(loaded, settings.lora, 0).items()}
    for module in modules(state):
        m, n = len(state[f"{module}.lora_B"]), state[f"{module}.lora_A"].shape[1]
        state = with_residual(state, module, torch.randn(m, k, generator=g) * 0.1, torch.randn(k, n, generator=g) * 0.1)
    return state


BATCH = {"input_ids": torch.tensor([[2, 7, 9, 30, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
MODELS = ("tiny_bert", "tiny_gpt2")


@pytest.mark.parametrize("kind", MODELS)
def test_taking_the_residual_out_restores_the_base_to_the_bit(kind: str, request: pytest.FixtureRequest):
    settings = config(request.getfixturevalue(kind), 'lora.target_modules="all-linear"')
    loaded = build(settings, Classification(("f", "m", "o")))
    state = random_state(loaded, settings, 3)
    bare = {n: v for n, v in state.items() if "residual" not in n}
    loaded.load(bare)
    with torch.no_grad():
        before = loaded.logits(BATCH)
        loaded.load(state)
        assert not torch.equal(loaded.logits(BATCH), before)
        loaded.load(bare)
        assert torch.equal(loaded.logits(BATCH), before)


def test_a_residual_of_an_unknown_module_or_half_of_one_is_refused(tiny_bert: Path):
    settings = config(tiny_bert)
    loaded = build(settings, Classification(("f", "m", "o")))
    state = initial_state(loaded, settings.lora, 0)
    with pytest.raises(ValueError, match="has no adapter"):
        loaded.load(with_residual(state, "nowhere", torch.ones(2, 1), torch.ones(1, 2)))
    module = modules(state)[0]
    with pytest.raises(ValueError, match="only one factor"):
        loaded.load({**state, f"{module}.residual_A": torch.ones(1, 32)})
    _build.cache_clear()
