"""One client's local steps in one round, with or without DP-SGD.

The caller loads nothing and keeps nothing: ``train_client`` overwrites the process's one model with the round's state,
takes a fresh optimiser (as FedSVD, FFA-LoRA and FedAvg do), and returns the change of the trained tensors. Every random
choice comes from (run seed, client, round), so the result depends on neither the process nor the clients that it served
before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlab.config import RunConfig
from fedlab.config.clients import rate_factor
from fedlab.config.sections import TrainSection
from fedlab.data import FederatedData
from fedlab.errors import RunFailed
from fedlab.lora.ranks import narrow, widen
from fedlab.lora.state import State
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.clipping import clipped_sum
from fedlab.privacy.plan import DPPlan
from fedlab.privacy.sampling import fixed_batches
from fedlab.seeds import random_stream, stream_seed
from fedlab.train.dp import PerExampleGradients
from fedlab.train.dropout import DropoutLayers, Masks, row_keys
from fedlab.train.opacus import OpacusGradients


@dataclass(frozen=True)
class Trained:
    """What a client gives back.

    ``loss`` and ``clip_fraction`` are not protected by the noise; see ``privacy.share_metrics``.
    """

    update: State  # trained name → new value − received value, float32
    examples: int  # of the client, public: it is the weight
    steps: int  # executed, counted and not assumed: the ledger compares them with what was charged
    loss: float  # mean over the examples seen; nan if none was drawn
    clip_fraction: float  # of the examples seen; nan without DP or if none was drawn
    seconds: float


def local_steps(train: TrainSection, examples: int) -> int:
    """Optimiser steps of one round: ``train.steps``, or ``train.epochs`` passes over the client's examples."""
    return train.steps if train.steps is not None else math.ceil(train.epochs * examples / train.batch_size)  # type: ignore[operator]


def learning_rate_factor(train: TrainSection, round_number: int, rounds: int) -> float:
    """Factor in (0, 1] for a round counted from 1: linear warm-up, then constant, linear or
    cosine decay (never to 0).
    """
    if round_number <= train.warmup_rounds:
        return round_number / (train.warmup_rounds + 1)
    if train.schedule == "constant":
        return 1.0
    done = (round_number - 1 - train.warmup_rounds) / max(1, rounds - train.warmup_rounds)  # [0, 1)
    return 1 - done if train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


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
    per_example: Callable[[LoadedModel, Iterable[str]], PerExampleGradients | OpacusGradients] = PerExampleGradients,
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
    names = sorted(trained)
    if not names:
        raise RunFailed("nothing is trainable: the strategy trains no adapter factor and train.head is frozen")
    own = narrow(state, rank) if rank is not None else state
    model.load(widen(own, state))
    indices = data.train(client)
    seed = config.sampling_seed
    steps = plan.steps if plan else local_steps(config.train, len(indices))
    factor = learning_rate_factor(config.train, round_number, config.run.rounds) * rate_factor(
        config, client, data.clients
    )
    optimizer = _optimizer(model, names, config, factor)
    draws = random_stream(seed, "batches", client, round_number)
    batches = (
        (plan.batch(draws) for _ in range(steps))
        if plan
        else iter(fixed_batches(len(indices), config.train.batch_size, steps, draws))
    )
    noise = plan.noise_source(random_stream(seed, "noise", client, round_number)) if plan else None
    ones = {name: torch.ones_like(own[name], device=model.device) for name in names} if rank is not None else {}
    inside = widen(ones, state)
    start = {name: model.parameters[name].detach().clone() for name in names} if config.train.prox else {}
    losses, seen, clipped, executed = 0.0, 0, 0, 0

    masks = Masks(config.lora.dropout)
    drops = stream_seed(seed, "dropout", client, round_number)

    with _left_as_it_was(model), DropoutLayers(model, masks), per_example(model, names if plan else []) as hooks:
        for step, batch in enumerate(batches):
            chunks = _chunks(data, indices[batch], config.train.physical_batch)

            def loss_of(chunk: np.ndarray, step: int = step) -> Tensor:
                masks.keys = torch.from_numpy(row_keys(drops, step, chunk)).to(model.device)
                return _loss(model, data, chunk)

            if plan and noise:
                total, step_losses, step_clipped = _clipped_gradients(loss_of, chunks, model, names, hooks, plan)
                gradients = plan.privatise(total, noise)
                clipped += step_clipped
            else:
                gradients, step_losses = _mean_gradients(loss_of, chunks, model, names, len(batch))
            losses, seen = losses + step_losses, seen + len(batch)
            for name in names:
                parameter = model.parameters[name]
                parameter.grad = gradients[name].to(parameter)
                if rank is not None:
                    parameter.grad *= inside[name]
                if (
                    config.train.prox
                ):  # FedProx: µ/2·‖w − w_t‖², added after the noise because it depends on released values only
                    parameter.grad += config.train.prox * (parameter.detach() - start[name])
            optimizer.step()
            executed += 1

    new = model.state() if rank is None else narrow(model.state(), rank)
    update = {name: new[name] - own[name] for name in names}
    check_finite(client, update, config.train)
    loss = losses / seen if seen else math.nan
    clip_fraction = clipped / seen if plan and seen else math.nan
    return Trained(update, len(indices), executed, loss, clip_fraction, time.perf_counter() - started)


def check_finite(client: str, update: State, train: TrainSection) -> None:
    """Raises RunFailed for an update that holds NaN or infinite values: training diverged."""
    if not all(bool(torch.isfinite(value).all()) for value in update.values()):
        raise RunFailed(f"{client}: local training diverged (NaN or infinite weights); lower train.lr = {train.lr}")


def rates(train: TrainSection, names: Iterable[str], factor: float) -> list[tuple[float, list[str]]]:
    """(learning rate, the tensors that it is for): the head's, and the adapter's.

    Groups without a tensor are left out.
    """
    head = {name for name in names if name.startswith("head.")}
    head_lr = train.lr if train.head_lr is None else train.head_lr
    groups = [(head_lr * factor, sorted(head)), (train.lr * factor, sorted(set(names) - head))]
    return [(lr, group) for lr, group in groups if group]


def _optimizer(model: LoadedModel, names: list[str], config: RunConfig, factor: float) -> torch.optim.Optimizer:
    train = config.train
    groups = [{"params": [model.parameters[n] for n in group], "lr": lr} for lr, group in rates(train, names, factor)]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=train.weight_decay)
    return torch.optim.SGD(groups, momentum=train.momentum, weight_decay=train.weight_decay)


@contextmanager
def _left_as_it_was(model: LoadedModel) -> Iterator[None]:
    """Afterwards nothing requires a gradient and none is kept."""
    try:
        yield
    finally:
        model.module.requires_grad_(False)
        for parameter in model.parameters.values():
            parameter.grad = None


def _chunks(data: FederatedData, indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Split a batch for the forward pass, texts of like length together: less padding, the same sum."""
    ordered = indices[np.argsort(data.tokens.lengths(indices), kind="stable")]
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _loss(model: LoadedModel, data: FederatedData, chunk: np.ndarray) -> Tensor:
    batch = data.batch(chunk, model.tokenizer.pad_token_id)
    return cross_entropy(model.logits(batch), batch["labels"].to(model.device), reduction="sum")


def _clipped_gradients(
    loss_of: Callable[[np.ndarray], Tensor],
    chunks: list[np.ndarray],
    model: LoadedModel,
    names: list[str],
    hooks: PerExampleGradients | OpacusGradients,
    plan: DPPlan,
) -> tuple[dict[str, Tensor], float, int]:
    """Sum over a Poisson batch of the clipped per-example gradients, in float64; zeros for an empty batch."""
    total = {name: torch.zeros_like(model.parameters[name], dtype=torch.float64) for name in names}
    losses, clipped = 0.0, 0
    for chunk in chunks:
        loss = loss_of(chunk)
        loss.backward()
        partial, norms = clipped_sum(hooks.take(), plan.clip)
        for name in names:
            total[name] += partial[name]
        losses += float(loss.detach())
        clipped += int((~(norms <= plan.clip)).sum())
    return total, losses, clipped


def _mean_gradients(
    loss_of: Callable[[np.ndarray], Tensor], chunks: list[np.ndarray], model: LoadedModel, names: list[str], count: int
) -> tuple[dict[str, Tensor], float]:
    """Gradient of the mean loss over a batch, without DP."""
    parameters = [model.parameters[name].requires_grad_() for name in names]
    total, losses = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}, 0.0
    for chunk in chunks:
        loss = loss_of(chunk)
        for name, gradient in zip(names, torch.autograd.grad(loss / count, parameters), strict=True):
            total[name] += gradient
        losses += float(loss.detach())
    return total, losses
