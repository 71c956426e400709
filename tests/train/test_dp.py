"""Per-example gradients against a loop over single examples in float64, and against Opacus."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.models.adapters import initial_state
from fedlab.models.loaded import LoadedModel
from fedlab.session import Session, open_session
from fedlab.train.dp import PerExampleGradients
from fedlab.train.opacus import OpacusGradients


def open_in_float64(toml: str, *overrides: str) -> Session:
    """A session of its own (not the process's cached one) with the model in float64 and B away from zero."""
    config = RunConfig.parse(toml, overrides)
    session = open_session.__wrapped__(config.to_toml())
    state = initial_state(session.model, config.lora, 0)
    g = torch.Generator().manual_seed(1)
    session.model.load(
        {n: v if not n.endswith("lora_B") else torch.randn(v.shape, generator=g) * 0.2 for n, v in state.items()}
    )
    session.model.module.double()
    return session


def loss_of(model: LoadedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return cross_entropy(model.module(**inputs).logits, batch["labels"], reduction="sum")


@pytest.fixture(params=["bert", "gpt2", "encoder"])
def session(request: pytest.FixtureRequest, tiny_toml: str, tiny_bert, tiny_gpt2, tiny_sentence_encoder) -> Session:
    if request.param == "gpt2":
        return open_in_float64(
            tiny_toml.replace(str(tiny_bert), str(tiny_gpt2)), "lora.target_modules=['c_attn', 'c_fc']"
        )
    if request.param == "encoder":
        return open_in_float64(
            tiny_toml.replace(str(tiny_bert), str(tiny_sentence_encoder)), "lora.target_modules=all-linear"
        )
    return open_in_float64(tiny_toml)


@pytest.mark.parametrize("parts", [("lora_B", "head"), ("lora_A", "lora_B", "head"), ("head",), ("lora_A", "lora_B")])
def test_equal_to_a_loop_over_single_examples(parts: tuple[str, ...], session: Session):
    model, tokens = session.model, session.data.tokens
    names = [n for n in model.parameters if n.endswith(parts) or (n.startswith("head.") and "head" in parts)]
    indices = session.data.train("client-0")[:7]
    with PerExampleGradients(model, names) as hooks:
        loss_of(model, tokens.batch(indices, model.tokenizer.pad_token_id)).backward()
        found = hooks.take()
    assert found.keys() == set(names)
    parameters = [model.parameters[n].requires_grad_() for n in names]
    for i, index in enumerate(indices):
        alone = loss_of(
            model, tokens.batch(np.array([index]), model.tokenizer.pad_token_id)
        )  # padded to its own length
        for name, wanted in zip(names, torch.autograd.grad(alone, parameters), strict=True):
            assert found[name][i].shape == wanted.shape
            assert torch.allclose(found[name][i], wanted, rtol=1e-6, atol=1e-9), name
    assert all(float(g.abs().sum()) > 0 for g in found.values())


def test_equal_to_opacus(session: Session):
    model = session.model
    names = [n for n in model.parameters if n.endswith("lora_B") or n.startswith("head.")]
    batch = session.data.tokens.batch(session.data.train("client-1")[:5], model.tokenizer.pad_token_id)
    with PerExampleGradients(model, names) as hooks:
        loss_of(model, batch).backward()
        found = hooks.take()
    with OpacusGradients(model, names) as reference:
        loss_of(model, batch).backward()
        wanted = reference.take()
        with pytest.raises(RuntimeError, match="no gradient reached"):
            reference.take()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-9, atol=1e-12) for name in names)
    assert not any(module.training for module in model.module.modules())
    assert all(p.grad is None and not p.requires_grad for p in model.module.parameters())


def test_nothing_below_the_lowest_trained_layer_is_differentiated(session: Session):
    model = session.model
    with PerExampleGradients(model, [n for n in model.parameters if n.startswith("head.")]):
        logits = model.logits(
            session.data.tokens.batch(session.data.train("client-0")[:3], model.tokenizer.pad_token_id)
        )
        assert logits.requires_grad
        logits.sum().backward()
    assert all(p.grad is None for p in model.module.parameters())


def test_a_layer_that_took_no_part_is_an_error(session: Session):
    model = session.model
    with (
        PerExampleGradients(model, list(model.parameters)) as hooks,
        pytest.raises(RuntimeError, match="no gradient reached"),
    ):
        hooks.take()


def test_other_layers_than_linear_are_refused(session: Session):
    model = session.model
    name = next(n for n in model.parameters if n.startswith("head."))
    model.owners[name] = torch.nn.LayerNorm(4)
    with pytest.raises(ConfigError, match="LayerNorm"):
        PerExampleGradients(model, [name])
