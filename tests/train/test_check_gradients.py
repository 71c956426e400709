"""The trial before round 1: it passes what is per example, and sees what only looks like it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, PrivacyError
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import _build as uncached
from fedlab.objectives import Classification
from fedlab.train import check_gradients
from fedlab.train.check_gradients import require_per_example, try_gradients
from fedlab.train.cohort import supports_fused
from fedlab.train.dp import PerExampleGradients
from fedlab.train.fused import Rows

ENGINES = ("fused", "hooks", "opacus")


def loaded_of(config: RunConfig) -> LoadedModel:
    objective = Classification(("fruit", "metal", "ocean"))
    return uncached.__wrapped__(config.model, config.lora, objective, config.run.dtype, "cpu")


def config_of(toml: str, model: Path, base: Path, *overrides: str) -> RunConfig:
    return RunConfig.parse(toml.replace(str(base), str(model)), overrides)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt2", "tiny_sentence_encoder"])
@pytest.mark.parametrize("overrides", [(), ("lora.dropout=0.3",), ("run.dtype=bfloat16",)])
def test_every_engine_passes_on_models_that_take_rows(
    engine: str,
    kind: str,
    overrides: tuple[str, ...],
    tiny_toml: str,
    tiny_bert: Path,
    request: pytest.FixtureRequest,
):
    settings = ["lora.target_modules=all-linear", *overrides]
    model = loaded_of(config_of(tiny_toml, request.getfixturevalue(kind), tiny_bert, *settings))
    before = model.state()
    verdict = try_gradients(model, model.parameters, engine)
    assert (verdict.layout, verdict.difference) == (None, None)
    assert all(torch.equal(before[name], value) for name, value in model.state().items()), "the model is as it was"
    assert not any(p.requires_grad for p in model.module.parameters())


def test_the_trial_is_made_once(tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    model = loaded_of(RunConfig.parse(tiny_toml))
    assert supports_fused(model, model.parameters)
    monkeypatch.setattr(check_gradients, "_trial", lambda *_: pytest.fail("again"))
    assert supports_fused(model, reversed(list(model.parameters)))


def swap_rows_and_tokens(model: LoadedModel) -> None:
    """Let the encoder's layers see [tokens, rows, d], as XLNet's do; what comes out is the same."""
    for layer in model.module.get_base_model().bert.encoder.layer:
        real = layer.intermediate.forward
        layer.intermediate.forward = lambda x, real=real: real(x.transpose(0, 1)).transpose(0, 1)


def mix_rows(model: LoadedModel) -> None:
    """A batch statistic: each text is moved by a hundredth of the batch's mean."""
    pooler = model.module.get_base_model().bert.pooler
    real = pooler.forward
    pooler.forward = lambda hidden: real(hidden) + 0.01 * real(hidden).mean(0, keepdim=True)


def read_padding(model: LoadedModel) -> None:
    """The classification reads the last place, padding or not."""
    pooler = model.module.get_base_model().bert.pooler
    real = pooler.forward
    pooler.forward = lambda hidden: real(hidden.flip(1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("defect", [swap_rows_and_tokens, mix_rows, read_padding])
def test_a_model_whose_rows_are_no_examples_is_refused_under_dp_by_every_engine(
    engine: str, defect, tiny_toml: str, tiny_bert: Path
):
    config = config_of(tiny_toml, tiny_bert, tiny_bert, "lora.target_modules=['dense']", f"train.gradients={engine}")
    model = loaded_of(config)
    defect(model)
    with pytest.raises(PrivacyError, match=rf"(?s)model\.name = '{tiny_bert}' \(bert\).*ε would be false"):
        require_per_example(model, config, model.parameters)
    free = config.model_copy(update={"privacy": config.privacy.model_copy(update={"unit": "none"})})
    require_per_example(model, free, model.parameters)


def test_an_engine_that_sums_over_the_batch_is_seen(tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    model, real = loaded_of(RunConfig.parse(tiny_toml)), PerExampleGradients.take

    def shared(self: PerExampleGradients) -> dict[str, Tensor]:
        return {name: g.mean(0, keepdim=True).expand_as(g) for name, g in real(self).items()}

    monkeypatch.setattr(PerExampleGradients, "take", shared)
    assert "differs from that of the text alone" in str(try_gradients(model, model.parameters, "hooks").difference)


def test_a_fused_layer_that_leaves_its_scale_out_is_seen(tiny_toml: str, monkeypatch: pytest.MonkeyPatch):
    model, real = loaded_of(RunConfig.parse(tiny_toml)), Rows.product
    monkeypatch.setattr(Rows, "product", lambda self, name, left, right, scale=1.0: real(self, name, left, right))
    assert "lora" in str(try_gradients(model, model.parameters, "fused").difference)


def test_a_layer_that_is_not_used_is_named_before_anything_is_trained(tiny_toml: str, tiny_bert: Path):
    model = loaded_of(config_of(tiny_toml, tiny_bert, tiny_bert, "lora.target_modules=all-linear"))
    pooler = model.module.get_base_model().bert.pooler
    pooler.forward = lambda hidden: hidden[:, 0]
    with pytest.raises(ConfigError, match=r"lora\.target_modules: no gradient reaches bert\.pooler\.dense"):
        try_gradients(model, model.parameters, "fused")
