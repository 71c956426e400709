"""What clients add to a sum over all of them: one Poisson batch each, clipped per example and summed, at one state.

Under shared noise (``privacy.survivors``) a round is one step of DP-SGD (Abadi et al., arXiv 1607.00133) on all
examples together: gradients can be added over clients because all are taken at the same state. So the rows of all
clients of a pass go through the model as if they were one client's, and only the clipped gradients are added up by
their owner. ``sum_client`` is one client by itself, the reference (tests/train/test_sums.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.data import FederatedData
from fedlab.lora.ranks import widen
from fedlab.lora.state import BASIS, State, part_of
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.plan import DPPlan
from fedlab.seeds import random_stream
from fedlab.train.cohort import draw, pass_memory, sum_gradients
from fedlab.train.dp import PerExampleGradients
from fedlab.train.dropout import DropoutLayers, Masks
from fedlab.train.fused import CohortLayers
from fedlab.train.local import LocalSteps, LocalTraining, Summed, trainable
from fedlab.train.opacus import OpacusGradients
from fedlab.train.trainer import Examples, clipped_sums, left_as_it_was

PerExample = Callable[[LoadedModel, Iterable[str]], PerExampleGradients | OpacusGradients]


def sum_clients(
    model: LoadedModel,
    data: FederatedData,
    trainings: Sequence[LocalTraining],
    trained: Iterable[str],
    config: RunConfig,
    round_number: int,
) -> dict[str, Summed]:
    """Every client's clipped sum of one Poisson batch, in passes that clients of the same rank share.

    Args:
        model: the process's one.
        data: all clients' examples.
        trainings: the clients; all start from the same state, and each has a plan of one step.
        trained: names of the tensors whose gradients are summed; their layers are linear (``supports_fused``).
        config: of the run.
        round_number: from 1.

    Returns:
        client → its sum. A gradient that is not finite is left out by the clip, so no client fails alone.

    Raises:
        ValueError: a client without a plan of one step.
    """
    names = trainable(trained)
    by_rank: dict[int | None, list[LocalTraining]] = {}
    for training in trainings:
        by_rank.setdefault(training.rank, []).append(training)
    found: dict[str, Summed] = {}
    for members in by_rank.values():
        found |= _shared_pass(model, data, members, names, config, round_number)
    return found


def sum_client(
    model: LoadedModel,
    data: FederatedData,
    training: LocalTraining,
    trained: Iterable[str],
    config: RunConfig,
    round_number: int,
    per_example: PerExample = PerExampleGradients,
) -> Summed:
    """One client's clipped sum of one Poisson batch, by itself. ``per_example`` is what yields its gradients."""
    started = time.perf_counter()
    names = trainable(trained)
    local, plan = _local(training, data, config, round_number)
    model.load(widen(local.own, training.state))
    masks = Masks(config.lora.dropout)
    examples = Examples(model, data, config.train.physical_batch, local.mask_seed, masks)
    with left_as_it_was(model), DropoutLayers(model, masks), per_example(model, names) as hooks:
        total = clipped_sums(examples.losses(local.batch(0), 0), model, names, hooks, local, plan.clip)
    local.executed += 1
    inside = local.inside(names) if training.rank is not None else {}
    return local.summed({n: total[n].cpu() * inside[n] if n in inside else total[n] for n in names}, _since(started))


def noised_share(
    found: Summed, plan: DPPlan, dimension: int, config: RunConfig, client: str, round_number: int
) -> dict[str, np.ndarray]:
    """A client's clipped sum on the grid, with its share of the noise: int64 arrays, to be added modulo 2^64.

    By itself it protects nobody; it leaves in a sum over clients alone. ``dimension``: coordinates of the signed scope.
    """
    draws = random_stream(config.sampling_seed, "noise", client, round_number)
    return plan.share_of(found.sums, dimension, plan.noise_words(draws))


def _local(
    training: LocalTraining, data: FederatedData, config: RunConfig, round_number: int
) -> tuple[LocalSteps, DPPlan]:
    plan = training.plan
    if plan is None or plan.steps != 1:
        raise ValueError(f"{training.client}: a sum over clients needs a plan of one step, got {plan}")
    return LocalSteps(training, data, config, round_number), plan


def _shared_pass(
    model: LoadedModel,
    data: FederatedData,
    members: Sequence[LocalTraining],
    names: list[str],
    config: RunConfig,
    round_number: int,
) -> dict[str, Summed]:
    """The sums of clients of one rank, whose rows use the same tensors."""
    started = time.perf_counter()
    found = [_local(training, data, config, round_number) for training in members]
    clients, clip = [local for local, _ in found], min(plan.clip for _, plan in found)
    if any(plan.clip != clip for _, plan in found):
        raise ValueError("clients of one sum have one clip: what each claims rests on the others' noise")
    own = clients[0].own
    model.load(widen(own, members[0].state))
    total = {
        name: torch.zeros((len(clients), *own[name].shape), dtype=torch.float64, device=model.device) for name in names
    }
    with (
        CohortLayers(model, _used(own, model.device), names, config.lora.dropout) as layers,
        pass_memory(model, config.run.checkpointing),
    ):
        sum_gradients(
            model, data, draw(clients, 0), clients, layers, config.train.physical_batch, total, one_state=True
        )
    for local in clients:
        local.executed += 1
    seconds = _since(started) / len(clients)
    return {
        local.training.client: local.summed({name: value[k] for name, value in total.items()}, seconds)
        for k, local in enumerate(clients)
    }


def _used(own: State, device: torch.device) -> dict[str, Tensor]:
    """The tensors that the layers work with, as of one client: [1, *shape]; bases as they are."""
    return {n: v.to(device) if part_of(n) == BASIS else v[None].to(device) for n, v in own.items()}


def _since(started: float) -> float:
    return time.perf_counter() - started
