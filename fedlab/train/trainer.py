"""One client's local steps in one round, with or without DP-SGD: the reference that the shared pass is held against.

The caller loads nothing and keeps nothing: ``train_client`` overwrites the process's one model with the round's state,
takes a fresh optimiser (as FedSVD, FFA-LoRA and FedAvg do), and returns the change of the trained tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.clients import rate_factor
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.lora.ranks import widen
from fedlab.lora.state import State
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.clipping import clipped_sum
from fedlab.privacy.plan import DPPlan
from fedlab.train.dp import PerExampleGradients
from fedlab.train.dropout import DropoutLayers, Masks, row_keys
from fedlab.train.local import LocalSteps, LocalTraining, Trained, trainable
from fedlab.train.opacus import OpacusGradients
from fedlab.train.optimizer import learning_rate_factor, make_optimizer

PerExample = Callable[[LoadedModel, Iterable[str]], PerExampleGradients | OpacusGradients]


@dataclass
class Examples:
    """One client's examples as a model sees them in a forward pass, with masks of their own.

    Args:
        size: examples per forward pass.
        mask_seed: names the stream of the client's dropout masks.
    """

    model: LoadedModel
    data: FederatedData
    size: int
    mask_seed: int
    masks: Masks = field(default_factory=Masks)

    def losses(self, batch: np.ndarray, step: int) -> Iterator[Tensor]:
        """The losses [N] of a batch's examples, one forward pass after the other, texts of like length together."""
        for chunk in by_length(self.data.tokens.lengths(batch), self.size):
            positions = batch[chunk]
            self.masks.keys = torch.from_numpy(row_keys(self.mask_seed, step, positions)).to(self.model.device)
            inputs = self.data.batch(positions, self.model.tokenizer.pad_token_id)
            yield self.model.objective.per_example_loss(self.model, inputs)


def train_client(
    model: LoadedModel,
    data: FederatedData,
    client: str,
    state: State,
    trained: Iterable[str],
    config: RunConfig,
    round_number: int,
    plan: DPPlan | None,
    rank: int | None = None,
    per_example: PerExample = PerExampleGradients,
) -> Trained:
    """Train the tensors named ``trained`` from ``state`` on one client's examples, for one round (counted from 1).

    With a ``plan``, each step is DP-SGD (Abadi et al., arXiv 1607.00133): a Poisson batch, per-example gradients
    clipped by one joint norm, their sum plus N(0, (σC)²) divided by the expected batch size. An empty batch is a step
    like any other: noise alone.
    ``rank`` is the client's own where it is below the state's: it trains the first so many directions, the others stay
    zero (their gradient is zero, and they get no noise), and the update has its shapes.
    ``per_example`` is what yields the per-example gradients; the audit puts canaries there
    (``fedlab.trainer_audit.observation``). Raises RunFailed if the local weights end up NaN or infinite.
    """
    started = time.perf_counter()
    names = trainable(trained)
    local = LocalSteps(LocalTraining(client, state, plan, rank), data, config, round_number)
    model.load(widen(local.own, state))
    factor = learning_rate_factor(config.train, round_number, config.run.rounds)
    factor *= rate_factor(config, client, data.clients)
    optimizer = make_optimizer(config.train, model.parameters, names, factor)
    inside = {n: v.to(model.device) for n, v in local.inside(names).items()} if rank is not None else {}
    start = {name: model.parameters[name].detach().clone() for name in names} if config.train.prox else {}
    masks = Masks(config.lora.dropout)
    examples = Examples(model, data, config.train.physical_batch, local.mask_seed, masks)

    with left_as_it_was(model), DropoutLayers(model, masks), per_example(model, names if plan else []) as hooks:
        for step in range(local.count):
            batch = local.batch(step)
            losses = examples.losses(batch, step)
            gradients = (
                _private_gradients(losses, model, names, hooks, local, plan)
                if plan
                else _mean_gradients(losses, model, names, local, len(batch))
            )
            for name in names:
                parameter = model.parameters[name]
                parameter.grad = gradients[name].to(parameter)
                if name in inside:
                    parameter.grad *= inside[name]
                if name in start:  # FedProx: µ/2·‖w − w_t‖², after the noise: it depends on released values only
                    parameter.grad += config.train.prox * (parameter.detach() - start[name])
            optimizer.step()
            local.executed += 1
    return local.result(model.state(), names, time.perf_counter() - started)


@contextmanager
def left_as_it_was(model: LoadedModel) -> Iterator[None]:
    """Afterwards nothing requires a gradient and none is kept."""
    try:
        yield
    finally:
        model.module.requires_grad_(False)
        for parameter in model.parameters.values():
            parameter.grad = None


def clipped_sums(
    losses: Iterator[Tensor],
    model: LoadedModel,
    names: list[str],
    hooks: PerExampleGradients | OpacusGradients,
    local: LocalSteps,
    clip: float,
) -> dict[str, Tensor]:
    """A Poisson batch's per-example gradients clipped and summed in float64; zeros for an empty batch."""
    total = {name: torch.zeros_like(model.parameters[name], dtype=torch.float64) for name in names}
    for each in losses:
        each.sum().backward()
        partial, norms = clipped_sum(hooks.take(), clip)
        for name in names:
            total[name] += partial[name]
        local.saw(len(each), float(each.detach().sum()), int((~(norms <= clip)).sum()))
    return total


def _private_gradients(
    losses: Iterator[Tensor],
    model: LoadedModel,
    names: list[str],
    hooks: PerExampleGradients | OpacusGradients,
    local: LocalSteps,
    plan: DPPlan,
) -> dict[str, Tensor]:
    """Clipped sums, noised and divided by the expected batch size."""
    total = clipped_sums(losses, model, names, hooks, local, plan.clip)
    assert local.noise is not None
    return plan.privatise(total, local.noise)


def _mean_gradients(
    losses: Iterator[Tensor], model: LoadedModel, names: list[str], local: LocalSteps, count: int
) -> dict[str, Tensor]:
    """Gradient of the mean loss over a batch of ``count`` examples, without DP."""
    parameters = [model.parameters[name].requires_grad_() for name in names]
    total = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
    for each in losses:
        for name, gradient in zip(names, torch.autograd.grad(each.sum() / count, parameters), strict=True):
            total[name] += gradient
        local.saw(len(each), float(each.detach().sum()), 0)
    return total
