"""Whether per-example gradients are what their name says, on the run's own model, before its first round.

The clip, and with it ε, rests on two things that no type can promise: row i of what an engine gives is the gradient of
example i's loss, and no example changes another's. A time-major model (XLNet: [tokens, rows, d]), a layer that sees
relative positions instead of examples (DeBERTa), a flattened or routed one break the first; padding that is read as
text, or statistics over a batch, break the second. So two made-up rows of unequal length go through the engine
together, and through plain autograd one by one, and must give the same numbers. That takes some 0.3 s for MiniLM
(1 s in bfloat16 where the processor has none).

No data is looked at, so nothing is charged. The answer is kept with the model, one per set of trained tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.errors import ConfigError, NotPerExample
from fedlab.models.loaded import LoadedModel
from fedlab.models.trial import together, trial_rows
from fedlab.models.watch import watching
from fedlab.objectives.base import Batch
from fedlab.seeds import torch_stream
from fedlab.train.dp import PerExampleGradients
from fedlab.train.dropout import DropoutLayers, Masks, row_keys
from fedlab.train.fused import CohortLayers, unfusable
from fedlab.train.opacus import OpacusGradients

# of the largest difference to the gradient's norm; float32 leaves 1e-5, and whatever breaks leaves 1e-2 and more
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.1}
# standard deviation of the adapters that the model is tried with: at B = 0, A would have no gradient; a head's layers
# give logits of about 1, so that the rows' errors differ
WEIGHTS = 0.05
# of the whole gradient's norm: below it, a tensor's part is measured against the whole. In bfloat16 the smallest parts
# of a deep decoder's gradient are rounding (30 blocks: half of a part of 0.4 %); rows that mix would show in all parts
FLOOR = {torch.float32: 1e-2, torch.float64: 1e-2, torch.bfloat16: 0.1}
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the trial found; None where all is well.

    Args:
        layout: why the trained layers do not see one row per example.
        difference: how an example's gradient differs from what it is alone.
    """

    layout: str | None = None
    difference: str | None = None


def check_trainable(model: LoadedModel, config: RunConfig, trained: Iterable[str]) -> None:
    """The check before round 1. Raises ConfigError for a model that cannot be trained like this by anybody; for a
    private run NotPerExample unless its engine gives each example's own gradient of these tensors.
    """
    if names := tuple(sorted(trained)):
        try_gradients(model, names, engine_of(model, config, names))
        require_per_example(model, config, names)


def require_per_example(model: LoadedModel, config: RunConfig, trained: Iterable[str]) -> None:
    """Raise NotPerExample unless a private run's engine gives each example's own gradient of these tensors.

    Does nothing where clients clip no examples.
    """
    names = tuple(sorted(trained))
    if config.privacy.unit != "example" or not names:
        return
    verdict = try_gradients(model, names, engine_of(model, config, names))
    if (problem := verdict.layout or verdict.difference) is not None:
        raise NotPerExample(
            f'privacy.unit = "example" with {described(model, config)}: {problem}. The clip would not hold and ε would'
            ' be false; adapt other modules (lora.target_modules), take another model, or set privacy.unit = "none"'
        )


def engine_of(model: LoadedModel, config: RunConfig, trained: Iterable[str]) -> str:
    """What gives a client's gradients: ``train.gradients``; hooks where fused layers cannot train these tensors."""
    asked = config.train.gradients
    return "hooks" if asked == "fused" and unfusable(model, trained) is not None else asked


def try_gradients(model: LoadedModel, trained: Iterable[str], engine: str) -> Verdict:
    """The verdict on an engine (``fused``, ``hooks`` or ``opacus``), from the trial or from an earlier one.

    Raises ConfigError for a model that cannot be trained like this by anybody: it does not read what its tokenizer
    writes, or does not use a layer that is to be trained.
    """
    names = tuple(sorted(trained))
    if (engine, names) not in model.verdicts:
        model.verdicts[engine, names] = _trial(model, names, engine)
    return cast(Verdict, model.verdicts[engine, names])


def described(model: LoadedModel, config: RunConfig) -> str:
    """The model and its family, for messages."""
    family = getattr(model.module.config, "model_type", type(model.module.get_base_model()).__name__)
    return f"model.name = {config.model.name!r} ({family})"


def _trial(model: LoadedModel, names: Sequence[str], engine: str) -> Verdict:
    rows = trial_rows(model)
    batch = together(rows, cast(int, model.tokenizer.pad_token_id))
    keys = torch.from_numpy(row_keys(0, 0, np.arange(len(rows)))).to(model.device)
    with _trial_weights(model):
        model.objective.check_model(model, batch)
        wanted = [_alone(model, row, names, keys[i : i + 1]) for i, row in enumerate(rows)]
        if layout := _misfed(model, batch, names):
            return Verdict(layout)
        for owners in ((0, 0), (0, 1)) if engine == "fused" else ((0, 0),):
            try:
                found = _by_engine(model, batch, names, keys, engine, owners)
            except Exception as error:  # whatever a model's layers make an engine trip over
                return Verdict(f'train.gradients = "{engine}" cannot be had of this model ({_line(error)})')
            if difference := _difference(found, wanted, _dtype(model)):
                return Verdict(None, difference)
    return Verdict()


@contextmanager
def _trial_weights(model: LoadedModel) -> Iterator[None]:
    """Made-up adapter and head tensors; afterwards those from before."""
    before = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in model.parameters.items():
                scale = parameter.shape[1] ** -0.5 if name.startswith("head.") and parameter.ndim > 1 else WEIGHTS
                parameter.copy_(scale * torch.randn(parameter.shape, generator=torch_stream(0, "trial", name)))
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                model.parameters[name].copy_(value)


def _alone(model: LoadedModel, row: Batch, names: Sequence[str], key: Tensor) -> Gradients:
    """An example's gradient by autograd, with nothing beside it. Raises ConfigError where there is none."""
    parameters = [model.parameters[name].requires_grad_() for name in names]
    try:
        with DropoutLayers(model, Masks(_dropout(model), key)):
            loss = model.objective.per_example_loss(model, row).sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        family = getattr(model.module.config, "model_type", "this model")
        raise ConfigError(
            f"model.name: {family} cannot be trained on what its tokenizer writes ({_line(error)}); take another model,"
            " or another lora.target_modules and lora.dropout"
        ) from error
    finally:
        model.module.requires_grad_(False)
    gradients = {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}
    if missing := sorted(set(names) - gradients.keys()):
        raise ConfigError(
            f"lora.target_modules: no gradient reaches {missing[0]}: the model does not use this layer; adapt other"
            " modules"
        )
    return gradients


def _misfed(model: LoadedModel, batch: Batch, names: Sequence[str]) -> str | None:
    """The trained layers that see something else than one row per example."""
    count, found = len(batch["input_ids"]), dict[str, tuple[int, ...]]()
    layers = {
        name: model.owners[name] if name.startswith("head.") else model.layer(name.rpartition(".")[0]) for name in names
    }

    def see(name: str, x: Tensor | None, _: object) -> None:
        if x is not None and x.shape[0] != count:
            found.setdefault(name, tuple(x.shape))

    with torch.no_grad(), watching(layers, see), DropoutLayers(model, Masks()):
        model.objective.visit(model, batch)
    if not found:
        return None
    first, shape = next(iter(found.items()))
    which = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in found})
    return (
        f"{', '.join(which)} cannot tell texts apart ({first.rpartition('.')[0]} is fed {list(shape)} for {count} texts"
        f" of {batch['input_ids'].shape[1]} tokens, not one row per text)"
    )


def _by_engine(
    model: LoadedModel, batch: Batch, names: Sequence[str], keys: Tensor, engine: str, owners: Sequence[int]
) -> Gradients:
    """name → [N, *shape] of the batch's rows; in a shared pass they belong to the clients ``owners``."""
    masks = Masks(_dropout(model), keys)
    try:
        if engine != "fused":
            hooks = OpacusGradients if engine == "opacus" else PerExampleGradients
            with DropoutLayers(model, masks), hooks(model, names) as open_hooks:
                model.objective.per_example_loss(model, batch).sum().backward()
                return open_hooks.take()
        count = max(owners) + 1
        stacked = {name: p.detach().expand(count, *p.shape).clone() for name, p in model.parameters.items()}
        with CohortLayers(model, stacked, names, _dropout(model)) as layers:
            layers.rows.owner = torch.tensor(owners, device=model.device)
            layers.rows.masks = masks
            model.objective.per_example_loss(model, batch).sum().backward()
            return layers.take()
    finally:
        model.module.requires_grad_(False)


def _difference(found: Gradients, wanted: Sequence[Gradients], dtype: torch.dtype) -> str | None:
    """Where rows differ from examples alone; each tensor for itself, since a large one would hide a small one."""
    for i, alone in enumerate(wanted):
        whole = torch.stack([g.double().norm() for g in alone.values()]).norm()
        for name, gradient in alone.items():
            if found[name].shape != (len(wanted), *gradient.shape):
                return f"the gradients of {name} have shape {list(found[name].shape)}, not one per text"
            gap = (found[name][i].double() - gradient.double()).norm()
            if not gap <= TOLERANCE[dtype] * (gradient.double().norm() + FLOOR[dtype] * whole):
                share = float(gap / gradient.double().norm().clamp(min=torch.finfo(torch.float32).tiny))
                return (
                    f"the gradient of {name} for a text in a batch differs from that of the text alone (relative"
                    f" difference {share:.2g})"
                )
    return None


def _dtype(model: LoadedModel) -> torch.dtype:
    dtype: torch.dtype = next(p for n, p in model.module.named_parameters() if "lora_" not in n).dtype
    return dtype


def _dropout(model: LoadedModel) -> float:
    return float(cast(Any, model.module.peft_config["default"]).lora_dropout)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
