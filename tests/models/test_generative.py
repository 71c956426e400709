"""Families of language models: whatever engine gives per-example gradients, they are those of each row alone; what a
run saves gives its scores in plain peft; the rest is refused with a reason that names it.

The default suite takes one family for each kind of trap; all engines are slow, and runs of all families are those of
``test_docs_table.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import generative
import numpy as np
import pytest
import torch
from torch import Tensor

import fedlab
from fedlab.config import RunConfig
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import _build as build_cached
from fedlab.models.trial import together, trial_rows
from fedlab.objectives import objective_class
from fedlab.session import open_session
from fedlab.train.dp import PerExampleGradients
from fedlab.train.fused import CohortLayers
from fedlab.train.opacus import OpacusGradients

LENGTHS = (3, 9, 5)
# (family, target modules) → what the refusal says; under DP alone where it is a PrivacyError
REFUSED: dict[tuple[str, str], tuple[type[fedlab.FedlabError], str]] = {
    ("opt", "all-linear"): (fedlab.PrivacyError, "fc1, fc2 cannot tell texts apart"),
    ("led", "auto"): (fedlab.PrivacyError, "query, value cannot tell texts apart"),
    ("led", "all-linear"): (fedlab.ConfigError, "no gradient reaches .*key_global"),
    ("qwen2-moe", "all-linear"): (
        fedlab.ConfigError,
        "exceeds model.layers.0.mlp.shared_expert_gate's smaller side, 1",
    ),
    ("gemma2", "auto"): (fedlab.ConfigError, "a soft cap, final_logit_softcapping = 30"),
    ("gemma2", "all-linear"): (fedlab.ConfigError, "a soft cap, final_logit_softcapping = 30"),
}
CELLS = [(family, targets) for family in generative.GENERATIVE for targets in ("auto", "all-linear")]
QUICK = {  # a trap each
    ("gpt2", "all-linear"),  # Conv1D, tied embeddings
    ("falcon", "all-linear"),  # adds in place to what an adapted layer gives; multi-query
    ("mixtral", "auto"),  # experts
    ("phi", "all-linear"),  # biases, one over the vocabulary too
    ("phi3", "auto"),  # one layer for queries, keys and values; no default in peft
    ("t5", "all-linear"),  # position bias of the first layer for all, scaled output, tied embeddings
    ("marian", "auto"),  # a bias after the output layer
    ("mbart", "auto"),  # a decoder that begins with the end of its labels
    ("m2m-100", "auto"),  # nothing of its own to make decoder inputs by
}
QUICK_RUNS = {("gpt2", "all-linear"), ("opt", "all-linear"), ("gemma2", "auto"), ("bart", "auto")}


def cells(quick: set[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*cell, id="-".join(cell), marks=[] if cell in quick else pytest.mark.slow) for cell in CELLS]


def loaded_from(config: RunConfig, dtype: str = "float32") -> LoadedModel:
    """The model of a configuration, nobody else's."""
    objective = objective_class(config.objective.name).of(config.objective, (), ())
    return build_cached.__wrapped__(config.model, config.lora, objective, dtype, "cpu")


def loaded_in_float64(config: RunConfig) -> LoadedModel:
    """The same in float64, with an adapter that is not at zero."""
    model = loaded_from(config)
    model.module.double()
    model.module.get_base_model().set_experts_implementation("eager")  # the default knows no float64
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.parameters.items()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return model


def alone(model: LoadedModel, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of one row without padding, by autograd of the mean cross-entropy of all logits."""
    parameters = {name: p.requires_grad_() for name, p in model.parameters.items()}
    inputs = {name: value for name, value in row.items() if name != "labels"}
    logits, labels = model.module(**inputs, labels=row["labels"]).logits[0], row["labels"][0]
    if model.objective.auto_class == "AutoModelForCausalLM":
        logits, labels = logits[:-1], labels[1:]
    loss = torch.nn.functional.cross_entropy(logits, labels)  # leaves −100 out
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    model.module.requires_grad_(False)
    return found


def by_engine(model: LoadedModel, batch: dict[str, Tensor], engine: str) -> dict[str, Tensor]:
    """name → [N, *shape]."""
    names = list(model.parameters)
    if engine == "fused":
        stacked = {name: p.detach()[None].clone() for name, p in model.parameters.items()}
        with CohortLayers(model, stacked, names) as layers:
            layers.rows.owner = torch.zeros(len(batch["labels"]), dtype=torch.long)
            model.objective.per_example_loss(model, batch).sum().backward()
            return layers.take()
    with {"opacus": OpacusGradients, "hooks": PerExampleGradients}[engine](model, names) as hooks:
        model.objective.per_example_loss(model, batch).sum().backward()
        return hooks.take()


@pytest.mark.parametrize(("family", "targets"), cells(QUICK))
def test_three_engines_give_what_each_row_gives_alone(family: str, targets: str, config_of: Callable[..., RunConfig]):
    """In float64, on a padded batch, against a loop that shares no code with the objective. Some families take softmax
    in float32 whatever comes in; what breaks leaves 1e-2 and more.
    """
    if (family, targets) in REFUSED:
        pytest.skip("refused")
    model = loaded_in_float64(config_of(family, f"lora.target_modules={targets}"))
    rows = trial_rows(model, LENGTHS)
    batch = together(rows, 0)
    padding = batch["attention_mask"] == 0
    assert padding.any()
    batch["input_ids"][padding] = 7  # whatever stands there
    wanted = [alone(model, row) for row in rows]
    for engine in ("fused", "hooks", "opacus"):
        found = by_engine(model, batch, engine)
        for i, row in enumerate(wanted):
            for name, gradient in row.items():
                gap = float((found[name][i] - gradient).norm())
                assert gap <= 1e-6 * max(1.0, float(gradient.norm())), f"{engine}, row {i}, {name}: {gap}"
                assert float(gradient.norm()) > 0, name


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize(("family", "targets"), sorted(QUICK_RUNS))
def test_a_private_round_reloads_or_is_refused_by_name(
    family: str, targets: str, config_of: Callable[..., RunConfig], tmp_path: Path
):
    config = config_of(family, f"lora.target_modules={targets}")
    if (family, targets) in REFUSED:
        error, text = REFUSED[family, targets]
        with pytest.raises(error, match=text) as refusal:
            fedlab.simulate(config, tmp_path / "run", quiet=True)
        assert any(fix in str(refusal.value) for fix in ("take another model", "adapt other modules", "lower it"))
        ledgers = (tmp_path / "run" / "ledger").rglob("*.jsonl")
        assert not any('"CHARGED"' in line for file in ledgers for line in file.read_text().splitlines())
        return
    run = fedlab.simulate(config, tmp_path / "run", quiet=True)
    assert run.result["status"] == "completed"
    assert run.result["excluded"] == 0
    assert plain_loss(run) == pytest.approx(run.result["scores"]["loss"], rel=1e-5)


def plain_loss(run: fedlab.Run) -> float:
    """Nats per label token of the run's test texts, by what AutoPeft makes of the adapter directory."""
    import json

    import peft

    told = json.loads((run.path / "adapter" / "labels.json").read_text())
    session = open_session(RunConfig.load(run.path / "run.toml").to_toml())
    auto = f"AutoPeft{session.model.objective.auto_class.removeprefix('Auto')}"
    model = getattr(peft, auto).from_pretrained(str(run.path / "adapter"), **told).eval()
    total, count = 0.0, 0
    for index in session.data.test:
        row = session.data.tokens.batch(np.array([index]), 0)
        with torch.no_grad():
            loss = float(model(**row).loss)
        labels = int((row["labels"] != -100).sum())
        total, count = total + loss * labels, count + labels
    return total / count
