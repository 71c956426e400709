"""Many clients in one pass: the frozen base is computed once for the rows of all of them, everything else is each
client's own.

What a client does is what ``trainer.train_client`` does for it alone: the same batches from the same streams, its own
clip, noise, momentum and rank, a step of noise alone where its Poisson batch is empty. Rows of all clients are sorted
by length and cut into chunks of ``train.physical_batch``, so many small batches fill large products, and padding is
less. Per-client tensors are stacked, [K, *shape]. The equality with one client at a time is in
tests/train/test_cohort.py; which clients share a pass never changes what they compute beyond rounding.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.clients import rate_factor
from fedlab.data import FederatedData
from fedlab.data.collate import by_length
from fedlab.errors import FedlabError, RunFailed
from fedlab.lora.ranks import widen
from fedlab.lora.state import BASIS, PAST, State, part_of
from fedlab.models.blocks import blocks_in_gradient, checkpointed
from fedlab.models.hardware import return_large_blocks
from fedlab.models.loaded import PEFT_PREFIX, LoadedModel
from fedlab.privacy.clipping import clip_factors, joint_norms
from fedlab.train.check_gradients import try_gradients
from fedlab.train.dropout import row_keys
from fedlab.train.fused import CohortLayers, unfusable
from fedlab.train.local import LocalSteps, LocalTraining, Trained, trainable
from fedlab.train.optimizer import StackedOptimizer, learning_rate_factor

CHECKPOINTING = "run.checkpointing"


@dataclass
class _Stack:
    """The tensors of K clients, stacked in the clients' order.

    Args:
        values: name → [K, *shape] of the trained tensors and of the other factor of their pairs.
        start: copies of ``values`` as they were received.
        used: what the layers work with: ``values``, one [*shape] where it is the same for all and stays, and bases.
        inside: trained name → [K, *shape], 0 beyond a client's own rank; empty if nobody's rank is lower.
        past: lora_A → [k, n], the A of earlier tasks, from which it is kept apart; empty outside O-LoRA.
    """

    names: list[str]
    values: dict[str, Tensor]
    start: dict[str, Tensor]
    used: dict[str, Tensor]
    inside: dict[str, Tensor]
    past: dict[str, Tensor]

    def zeros(self, count: int) -> dict[str, Tensor]:
        """Trained name → zeros for the first ``count`` clients, float64."""
        return {
            name: torch.zeros(
                (count, *self.values[name].shape[1:]), dtype=torch.float64, device=self.values[name].device
            )
            for name in self.names
        }


@dataclass
class Batch:
    """The rows of one step over all clients that still train."""

    rows: np.ndarray  # corpus positions [N]
    owner: np.ndarray  # position of each row's client in the cohort [N]
    counts: np.ndarray  # rows of each client [K]
    keys: np.ndarray  # of the rows' dropout masks [N]


def supports_fused(model: LoadedModel, trained: Iterable[str]) -> bool:
    """Whether ``train_cohort`` can train these tensors: its layers are linear ones, trained whole, and see one row per
    example.
    """
    names = list(trained)
    return unfusable(model, names) is None and try_gradients(model, names, "fused").layout is None


def train_cohort(
    model: LoadedModel,
    data: FederatedData,
    trainings: Sequence[LocalTraining],
    trained: Sequence[str],
    config: RunConfig,
    round_number: int,
) -> dict[str, Trained | FedlabError]:
    """Train all clients for one round; per client its result, or why its update cannot be used (it diverged).

    All states share the same residual and the same frozen tensors but for those a client keeps to itself (which are
    trained). Raises what concerns everybody: nothing trainable, a trained layer that is not linear
    (``supports_fused``).
    """
    started = time.perf_counter()
    names = trainable(trained)
    clients = sorted((LocalSteps(t, data, config, round_number) for t in trainings), key=lambda c: -c.count)
    model.load(clients[0].training.state)
    stack = _stack(clients, names, model.device)
    own_rates = [rate_factor(config, c.training.client, data.clients) for c in clients]
    factors = torch.tensor(own_rates, dtype=torch.float64, device=model.device)
    factor = learning_rate_factor(config.train, round_number, config.run.rounds)
    optimizer = StackedOptimizer(config.train, names, stack.values, factor, factors)
    with (
        CohortLayers(model, stack.used, names, config.lora.dropout) as layers,
        pass_memory(model, config.run.checkpointing),
    ):
        for step in range(clients[0].count):
            active = [c for c in clients if c.count > step]  # sorted: the first ones of the stack
            batch = draw(active, step)
            sums = sum_gradients(
                model, data, batch, active, layers, config.train.physical_batch, stack.zeros(len(active))
            )
            gradients = _finish(sums, active, batch, stack)
            _pull(gradients, stack, len(active), config)
            optimizer.step(gradients, len(active))
            for c in active:
                c.executed += 1
    seconds = (time.perf_counter() - started) / len(clients)
    return {c.training.client: _result(c, k, stack, seconds) for k, c in enumerate(clients)}


def pass_memory(model: LoadedModel, checkpointing: bool) -> AbstractContextManager[None]:
    """Blocks with adapters keep their inputs only, if asked; those below keep nothing anyway."""
    if not checkpointing:
        return nullcontext()
    if model.device.type == "cpu":
        return_large_blocks()
    adapted = [PEFT_PREFIX + name for name in model.scale]
    return checkpointed(blocks_in_gradient(model.module, adapted, CHECKPOINTING))


def _stack(clients: list[LocalSteps], names: list[str], device: torch.device) -> _Stack:
    def stacked(name: str) -> Tensor:
        return torch.stack([widen({name: c.own[name]}, c.training.state)[name] for c in clients]).to(device)

    own = clients[0].own
    start = {name: stacked(name) for name in _needed(names, own)}
    values = {name: value.clone() for name, value in start.items()}
    shared = {
        name for name, value in values.items() if name not in names and all(torch.equal(one, value[0]) for one in value)
    }
    used = {name: value[0] if name in shared else value for name, value in values.items()}
    used |= {name: value.to(device) for name, value in own.items() if part_of(name) == BASIS}
    return _Stack(names, values, start, used, _inside(clients, names, device), _past(own, names, device))


def _needed(names: Sequence[str], state: State) -> list[str]:
    """The trained tensors, and the other factor of every pair of which one is trained."""
    pairs = {
        f"{name.rpartition('.')[0]}.{part}"
        for name in names
        if not name.startswith("head.")
        for part in ("lora_A", "lora_B")
    }
    return sorted({*names, *pairs} & state.keys())


def _inside(clients: list[LocalSteps], names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    if all(c.training.rank is None for c in clients):
        return {}
    ones = [c.inside(names) for c in clients]
    return {name: torch.stack([one[name] for one in ones]).to(device) for name in names}


def _past(state: State, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    found = {f"{n.rpartition('.')[0]}.lora_A": value.to(device) for n, value in state.items() if part_of(n) == PAST}
    return {name: past for name, past in found.items() if name in names and len(past)}


def draw(active: Sequence[LocalSteps], step: int) -> Batch:
    """The rows of a step, in the clients' order."""
    batches = [c.batch(step) for c in active]
    counts = np.array([len(b) for b in batches])
    keys = [row_keys(c.mask_seed, step, b) for c, b in zip(active, batches, strict=True)]
    return Batch(np.concatenate(batches), np.repeat(np.arange(len(active)), counts), counts, np.concatenate(keys))


def sum_gradients(
    model: LoadedModel,
    data: FederatedData,
    batch: Batch,
    active: Sequence[LocalSteps],
    layers: CohortLayers,
    size: int,
    total: dict[str, Tensor],
    one_state: bool = False,
) -> dict[str, Tensor]:
    """``total`` [K, *shape], float64, with every client's per-example gradients of a step added, clipped under DP.

    Args:
        model: the process's one.
        data: all clients' examples.
        batch: the step's rows.
        active: its K clients.
        layers: hold the clients' tensors, or with ``one_state`` [1, *shape] that all rows use.
        size: rows of a forward pass.
        total: trained name → what is added to.
        one_state: all clients are at one state; only what comes out is kept apart.
    """
    count = len(active)
    losses, clipped = np.zeros(count), np.zeros(count, dtype=np.int64)
    clips = [c.plan.clip if c.plan else math.inf for c in active]
    limits = torch.tensor(clips, dtype=torch.float64, device=model.device)
    private = bool(torch.isfinite(limits).any())
    layers.rows.totals = None if private else total
    for chunk in by_length(data.tokens.lengths(batch.rows), size):
        owner = torch.from_numpy(batch.owner[chunk]).to(model.device)
        layers.rows.owner = torch.zeros_like(owner) if one_state else owner
        layers.rows.masks.keys = torch.from_numpy(batch.keys[chunk]).to(model.device)
        tokens = data.batch(batch.rows[chunk], model.tokenizer.pad_token_id)
        each = model.objective.per_example_loss(model, tokens)
        each.sum().backward()
        gradients = layers.take()
        factors, over = row_factors(gradients, limits[owner]) if private else (None, None)
        add_by_client(total, gradients, factors, owner)
        np.add.at(losses, batch.owner[chunk], each.detach().double().cpu().numpy())
        if over is not None:
            np.add.at(clipped, batch.owner[chunk], over.cpu().numpy())
    for k, c in enumerate(active):
        c.saw(int(batch.counts[k]), float(losses[k]), int(clipped[k]))
    return total


def row_factors(gradients: dict[str, Tensor], limits: Tensor) -> tuple[Tensor, Tensor]:
    """Clip factor per row, 0 for a gradient that is not finite, and whether it was above its clip."""
    norms = joint_norms(gradient for _, gradient in sorted(gradients.items()))
    factors = torch.ones_like(norms)
    for limit in limits.unique().tolist():
        if math.isfinite(limit):
            mine = limits == limit
            factors[mine] = clip_factors(norms[mine], limit)
    return factors, ~(norms <= limits)


def add_by_client(
    total: dict[str, Tensor], gradients: dict[str, Tensor], factors: Tensor | None, owner: Tensor
) -> None:
    """total[k] += Σ over rows of client k, in the order of the rows.

    A row of factor 0 is left out, since 0·NaN is NaN.
    """
    if factors is not None and not bool((usable := factors > 0).all()):
        gradients = {name: gradient[usable] for name, gradient in gradients.items()}
        factors, owner = factors[usable], owner[usable]
    for name, gradient in gradients.items():
        rows = gradient.double()
        total[name].index_add_(0, owner, rows if factors is None else torch.einsum("n,n...->n...", factors, rows))


def _finish(sums: dict[str, Tensor], active: list[LocalSteps], batch: Batch, stack: _Stack) -> dict[str, Tensor]:
    """What the optimiser gets, [active, *shape]: noised and divided by the expected size under DP, else the mean over
    the batch.
    """

    def finished(k: int, c: LocalSteps) -> dict[str, Tensor]:
        mine = {name: value[k] for name, value in sums.items()}
        if c.plan and c.noise:
            return c.plan.privatise(mine, c.noise)
        return {name: value / max(1, int(batch.counts[k])) for name, value in mine.items()}

    result = {name: torch.empty_like(stack.values[name][: len(active)]) for name in stack.names}
    for k, mine in enumerate(_mapped(finished, active, sums)):
        for name, value in mine.items():
            result[name][k] = value.to(result[name].dtype)
    for name, mask in stack.inside.items():
        result[name] *= mask[: len(active)]
    return result


def _mapped(
    finished: Callable[[int, LocalSteps], dict[str, Tensor]], active: list[LocalSteps], sums: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """``finished`` of every client, in order. Beside a GPU in threads: noise is drawn on the CPU, each client's from
    its own source, and took 60 to 80 % of a step on an H200 while all cores but one had nothing to do.
    """
    threads = min(os.cpu_count() or 1, len(active)) if any(value.is_cuda for value in sums.values()) else 1
    if threads < 2 or not any(c.plan for c in active):
        yield from map(finished, range(len(active)), active)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(finished, range(len(active)), active)


def _pull(gradients: dict[str, Tensor], stack: _Stack, active: int, config: RunConfig) -> None:
    """Add what depends on released values only: FedProx' pull to the start, O-LoRA's away from earlier tasks."""
    if config.train.prox:
        for name in stack.names:
            gradients[name] += config.train.prox * (stack.values[name][:active] - stack.start[name][:active])
    for name, past in stack.past.items():
        gradients[name] += penalty_gradient(stack.values[name][:active], past, config.stream.penalty)


def penalty_gradient(A: Tensor, past: Tensor, weight: float) -> Tensor:
    """Gradient of weight·Σ|A·pastᵀ| in A [K, r, n] (O-LoRA, arXiv 2310.14152, Eq.

    8). It depends on no data and comes after the noise.
    """
    return weight * (torch.sign(A @ past.mT) @ past)


def _result(client: LocalSteps, k: int, stack: _Stack, seconds: float) -> Trained | FedlabError:
    end = {name: stack.values[name][k].to("cpu") for name in stack.names}
    try:
        return client.result(end, stack.names, seconds)
    except RunFailed as error:
        return error
