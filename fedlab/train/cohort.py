"""Many clients in one pass: the frozen base is computed once for the rows of all of them, everything else is each
client's own.

What a client does is what ``trainer.train_client`` does for it alone: the same batches from the same streams, its own
clip, noise, momentum and rank, a step of noise alone where its Poisson batch is empty. Rows of all clients are sorted
by length and cut into chunks of
``train.physical_batch``, so many small batches fill large products, and padding is less. Per-client tensors are
stacked, [K, *shape]. The equality with one client at a time is in tests/train/test_cohort.py; which clients share a
pass never changes what they compute beyond rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedlab.config import RunConfig
from fedlab.config.clients import rate_factor
from fedlab.data import FederatedData
from fedlab.errors import FedlabError, RunFailed
from fedlab.lora.ranks import narrow, widen
from fedlab.lora.state import BASIS, PAST, State, part_of
from fedlab.models.blocks import checkpointed, find_blocks
from fedlab.models.hardware import return_large_blocks
from fedlab.models.loaded import PEFT_PREFIX, LoadedModel
from fedlab.privacy.clipping import clip_factors
from fedlab.privacy.noise import GaussianNoise
from fedlab.privacy.plan import DPPlan
from fedlab.privacy.sampling import fixed_batches
from fedlab.seeds import random_stream, stream_seed
from fedlab.train.dropout import row_keys
from fedlab.train.fused import CohortLayers
from fedlab.train.trainer import Trained, check_finite, learning_rate_factor, local_steps, rates

CHECKPOINTING = "run.checkpointing"


@dataclass
class Member:
    """One client of a cohort: what it starts from and under which plan."""

    client: str
    state: State
    plan: DPPlan | None = None
    rank: int | None = None  # its own, where that is below the state's


@dataclass
class _Worker:
    """What is kept of a member while the cohort trains."""

    member: Member
    own: State  # the state at its own rank
    indices: np.ndarray
    steps: int
    draws: np.random.Generator
    fixed: list[np.ndarray]
    noise: GaussianNoise | None
    drops: int  # names the stream of its dropout masks
    losses: float = 0.0
    seen: int = 0
    clipped: int = 0
    executed: int = 0

    def batch(self, step: int) -> np.ndarray:
        """Corpus positions of one step's examples."""
        plan = self.member.plan
        chosen: np.ndarray = self.indices[plan.batch(self.draws) if plan else self.fixed[step]]
        return chosen


@dataclass
class _Batch:
    """The rows of one step over all clients that still train."""

    rows: np.ndarray  # corpus positions [N]
    owner: np.ndarray  # position of each row's client in the cohort [N]
    counts: np.ndarray  # rows of each client [K]
    keys: np.ndarray  # of the rows' dropout masks [N]


@dataclass
class _Sums:
    """Per-client sums over the rows of one step, [K, *shape], float64."""

    gradients: dict[str, Tensor]
    losses: np.ndarray
    clipped: np.ndarray


def train_cohort(
    model: LoadedModel,
    data: FederatedData,
    members: Sequence[Member],
    trained: Sequence[str],
    config: RunConfig,
    round_number: int,
) -> dict[str, Trained | FedlabError]:
    """Train all members for one round; per client its result, or why its update cannot be used (it diverged).

    All states share the same residual and the same frozen tensors but for those a client keeps to itself (which are
    trained). Raises what concerns everybody: nothing trainable, a trained layer that is not linear.
    """
    started = time.perf_counter()
    names = sorted(trained)
    if not names:
        raise RunFailed("nothing is trainable: the strategy trains no adapter factor and train.head is frozen")
    workers = sorted((_worker(data, member, config, round_number) for member in members), key=lambda w: -w.steps)
    model.load(workers[0].member.state)
    start = {name: _stack(workers, name, model.device) for name in _needed(names, workers[0].own)}
    tensors = {name: value.clone() for name, value in start.items()}
    shared = {
        name
        for name in tensors
        if name not in names and all(torch.equal(value, tensors[name][0]) for value in tensors[name])
    }
    seen = {name: value[0] if name in shared else value for name, value in tensors.items()}  # as the layers use them
    seen |= {name: value.to(model.device) for name, value in workers[0].own.items() if part_of(name) == BASIS}
    like = {name: tensors[name] for name in names}
    inside = _inside(workers, names, model.device)
    pasts = _pasts(workers[0].own, names, model.device)
    factors = torch.tensor(
        [rate_factor(config, w.member.client, data.clients) for w in workers], dtype=torch.float64, device=model.device
    )
    optimizer = _Optimizer(
        config, names, tensors, learning_rate_factor(config.train, round_number, config.run.rounds), factors
    )
    with CohortLayers(model, seen, names, config.lora.dropout) as layers, _memory(model, config.run.checkpointing):
        for step in range(max(w.steps for w in workers)):
            active = [w for w in workers if w.steps > step]  # sorted: the first ones of the stack
            batch = _draw(active, step)
            sums = _gradients(model, data, batch, active, layers, config.train.physical_batch, like)
            gradients = _finish(sums, active, batch, inside, like)
            for w, losses, clipped, count in zip(active, sums.losses, sums.clipped, batch.counts, strict=True):
                w.losses, w.clipped, w.seen = w.losses + float(losses), w.clipped + int(clipped), w.seen + int(count)
                w.executed += 1
            if config.train.prox:
                for name in names:
                    gradients[name] += config.train.prox * (tensors[name][: len(active)] - start[name][: len(active)])
            for name, past in pasts.items():
                gradients[name] += penalty_gradient(tensors[name][: len(active)], past, config.stream.penalty)
            optimizer.step(gradients, len(active))
    seconds = (time.perf_counter() - started) / len(workers)
    return {w.member.client: _result(w, k, tensors, names, config, seconds) for k, w in enumerate(workers)}


def _memory(model: LoadedModel, checkpointing: bool) -> AbstractContextManager[None]:
    """Blocks with adapters keep their inputs only, if asked; those below keep nothing anyway."""
    if not checkpointing:
        return nullcontext()
    if model.device.type == "cpu":
        return_large_blocks()
    blocks, lowest = find_blocks(model.module, [PEFT_PREFIX + name for name in model.scale], CHECKPOINTING)
    return checkpointed(blocks[lowest:])


def _worker(data: FederatedData, member: Member, config: RunConfig, round_number: int) -> _Worker:
    seed, client, plan = config.sampling_seed, member.client, member.plan
    indices = data.train(client)
    steps = plan.steps if plan else local_steps(config.train, len(indices))
    draws = random_stream(seed, "batches", client, round_number)
    fixed = [] if plan else list(fixed_batches(len(indices), config.train.batch_size, steps, draws))
    noise = plan.noise_source(random_stream(seed, "noise", client, round_number)) if plan else None
    own = narrow(member.state, member.rank) if member.rank is not None else member.state
    drops = stream_seed(seed, "dropout", client, round_number)
    return _Worker(member, own, indices, steps, draws, fixed, noise, drops)


def _pasts(state: State, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """lora_A → the A of earlier tasks [k, n], from which it is kept apart; empty outside O-LoRA."""
    pasts = {f"{n.rpartition('.')[0]}.lora_A": value.to(device) for n, value in state.items() if part_of(n) == PAST}
    return {name: past for name, past in pasts.items() if name in names and len(past)}


def penalty_gradient(A: Tensor, past: Tensor, weight: float) -> Tensor:
    """Gradient of weight·Σ|A·pastᵀ| in A [K, r, n] (O-LoRA, arXiv 2310.14152, Eq.

    8). It depends on no data and comes after the noise.
    """
    return weight * (torch.sign(A @ past.mT) @ past)


def _needed(names: Sequence[str], state: State) -> list[str]:
    """The trained tensors, and the other factor of every pair of which one is trained."""
    pairs = {
        f"{name.rpartition('.')[0]}.{part}"
        for name in names
        if not name.startswith("head.")
        for part in ("lora_A", "lora_B")
    }
    return sorted({*names, *pairs} & state.keys())


def _stack(workers: list[_Worker], name: str, device: torch.device) -> Tensor:
    return torch.stack([widen({name: w.own[name]}, w.member.state)[name] for w in workers]).to(device)


def _inside(workers: list[_Worker], names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """1 where a client trains, 0 in directions beyond its rank; empty if nobody's rank is lower."""
    if all(w.member.rank is None for w in workers):
        return {}
    ones = [widen({n: torch.ones_like(w.own[n]) for n in names}, w.member.state) for w in workers]
    return {name: torch.stack([one[name] for one in ones]).to(device) for name in names}


def _draw(active: list[_Worker], step: int) -> _Batch:
    batches = [w.batch(step) for w in active]
    counts = np.array([len(b) for b in batches])
    keys = [row_keys(w.drops, step, b) for w, b in zip(active, batches, strict=True)]
    return _Batch(np.concatenate(batches), np.repeat(np.arange(len(active)), counts), counts, np.concatenate(keys))


def _gradients(
    model: LoadedModel,
    data: FederatedData,
    batch: _Batch,
    active: list[_Worker],
    layers: CohortLayers,
    size: int,
    like: dict[str, Tensor],
) -> _Sums:
    """Per-client sums of the clipped (or, without DP, plain) per-example gradients of one step, in float64."""
    count = len(active)
    total = {
        name: torch.zeros((count, *value.shape[1:]), dtype=torch.float64, device=value.device)
        for name, value in like.items()
    }
    losses, clipped = np.zeros(count), np.zeros(count, dtype=np.int64)
    limits = torch.tensor(
        [w.member.plan.clip if w.member.plan else math.inf for w in active], dtype=torch.float64, device=model.device
    )
    private = bool(torch.isfinite(limits).any())
    layers.rows.totals = None if private else total
    order = np.argsort(data.tokens.lengths(batch.rows), kind="stable") if len(batch.rows) else batch.rows
    for i in range(0, len(order), size):
        chunk = order[i : i + size]
        owner = batch.owner[chunk]
        layers.rows.owner = torch.from_numpy(owner).to(model.device)
        layers.rows.masks.keys = torch.from_numpy(batch.keys[chunk]).to(model.device)
        tokens = data.batch(batch.rows[chunk], model.tokenizer.pad_token_id)
        each = cross_entropy(model.logits(tokens), tokens["labels"].to(model.device), reduction="none")
        each.sum().backward()
        gradients = layers.take()
        factors, over = _factors(gradients, limits[layers.rows.owner]) if private else (None, None)
        _add_by_client(total, gradients, factors, layers.rows.owner)
        np.add.at(losses, owner, each.detach().double().cpu().numpy())
        if over is not None:
            np.add.at(clipped, owner, over.cpu().numpy())
    return _Sums(total, losses, clipped)


def _factors(gradients: dict[str, Tensor], limits: Tensor) -> tuple[Tensor, Tensor]:
    """Clip factor per row, 0 for a gradient that is not finite, and whether it was above its clip."""
    squares = [g.flatten(1).double().square().sum(1) for _, g in sorted(gradients.items())]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = torch.ones_like(norms)
    for limit in limits.unique().tolist():
        if math.isfinite(limit):
            mine = limits == limit
            factors[mine] = clip_factors(norms[mine], limit)
    return factors, ~(norms <= limits)


def _add_by_client(
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


def _finish(
    sums: _Sums, active: list[_Worker], batch: _Batch, inside: dict[str, Tensor], like: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the optimiser gets, [active, *shape]: noised and divided by the expected size under DP, else the mean over
    the batch.
    """
    result = {name: torch.empty_like(value[: len(active)]) for name, value in like.items()}
    for k, w in enumerate(active):
        mine = {name: value[k] for name, value in sums.gradients.items()}
        if w.member.plan and w.noise:
            mine = w.member.plan.privatise(mine, w.noise)
        else:
            mine = {name: value / max(1, int(batch.counts[k])) for name, value in mine.items()}
        for name, value in mine.items():
            result[name][k] = value.to(result[name].dtype)
    for name, mask in inside.items():
        result[name] *= mask[: len(active)]
    return result


class _Optimizer:
    """The run's optimiser on stacked tensors: elementwise, so each client's steps are its own. Fresh in every round.

    ``factors`` [K]: what each client's learning rates are multiplied with. A step is linear in its rate, so it is the
    step that is scaled.
    """

    def __init__(
        self, config: RunConfig, names: Sequence[str], tensors: dict[str, Tensor], factor: float, factors: Tensor
    ) -> None:
        self._train, self._tensors = config.train, tensors
        self._factors = None if bool((factors == 1).all()) else factors
        self._groups = rates(config.train, names, factor)
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], active: int) -> None:
        """One step of the first ``active`` clients of the stack."""
        before = {} if self._factors is None else {n: self._tensors[n][:active].clone() for n in gradients}
        self._plain(gradients, active)
        for name, start in before.items():
            value = self._tensors[name][:active]
            factors = cast(Tensor, self._factors)[:active].to(value.dtype).view(-1, *[1] * (value.ndim - 1))
            value.copy_(start + factors * (value - start))

    def _plain(self, gradients: dict[str, Tensor], active: int) -> None:
        train = self._train
        for lr, names in self._groups:
            values, grads = [self._tensors[n][:active] for n in names], [gradients[n] for n in names]
            if train.optimizer == "adamw":
                for n in names:
                    self._first.setdefault(n, torch.zeros_like(self._tensors[n]))
                    self._second.setdefault(n, torch.zeros_like(self._tensors[n]))
                first, second = [self._first[n][:active] for n in names], [self._second[n][:active] for n in names]
                counts = [torch.tensor(float(self._steps)) for _ in names]
                decay = train.weight_decay
                options = {
                    "amsgrad": False,
                    "beta1": 0.9,
                    "beta2": 0.999,
                    "lr": lr,
                    "weight_decay": decay,
                    "eps": 1e-8,
                    "maximize": False,
                }
                adamw(values, grads, first, second, [], counts, **options)  # type: ignore[arg-type]
                continue
            buffers: list[Tensor | None] = [self._first[n][:active] if n in self._first else None for n in names]
            sgd(
                values,
                grads,
                buffers,
                weight_decay=train.weight_decay,
                momentum=train.momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            if train.momentum and self._steps == 0:
                self._first |= {n: b for n, b in zip(names, buffers, strict=True) if b is not None}
        self._steps += 1


def _result(
    w: _Worker, k: int, tensors: dict[str, Tensor], names: Sequence[str], config: RunConfig, seconds: float
) -> Trained | FedlabError:
    end = {name: tensors[name][k].to("cpu") for name in names}
    if w.member.rank is not None:
        end = narrow(end, w.member.rank)
    update = {name: end[name] - w.own[name] for name in names}
    try:
        check_finite(w.member.client, update, config.train)
    except RunFailed as error:
        return error
    loss = w.losses / w.seen if w.seen else math.nan
    clip_fraction = w.clipped / w.seen if w.member.plan and w.seen else math.nan
    return Trained(update, len(w.indices), w.executed, loss, clip_fraction, seconds)
