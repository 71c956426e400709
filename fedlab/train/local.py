"""One client's part in a round, whoever computes it: what it starts from, its random choices, what it gives back.

Every random choice comes from (run seed, client, round), so what a client does depends neither on the process, nor on
the clients that train beside it, nor on those that the process served before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.clients import rate_factor
from fedlab.config.sections import TrainSection
from fedlab.data import FederatedData
from fedlab.errors import Diverged, RunFailed
from fedlab.lora.ranks import narrow, widen
from fedlab.lora.state import State
from fedlab.privacy.plan import DPPlan
from fedlab.privacy.sampling import fixed_batches
from fedlab.seeds import random_stream, stream_seed


@dataclass(frozen=True)
class LocalTraining:
    """What a client trains from in a round, and under which plan.

    Args:
        client: its id.
        state: what it starts from, [the server's shapes].
        plan: its DP-SGD plan; None if it adds no noise itself.
        rank: its adapter's own rank, where that is below the state's.
    """

    client: str
    state: State
    plan: DPPlan | None = None
    rank: int | None = None


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


@dataclass(frozen=True)
class Summed:
    """What a client adds to a sum over clients, before its share of the noise: one Poisson batch's clipped gradients.

    ``loss`` and ``clip_fraction`` are as in ``Trained``.
    """

    sums: State  # trained name → Σ clipped gradients, float64, in the state's shapes
    examples: int
    steps: int
    loss: float
    clip_fraction: float
    seconds: float


class LocalSteps:
    """The steps of one client in one round: its batches, noise and masks, and what is counted while they are taken."""

    def __init__(self, training: LocalTraining, data: FederatedData, config: RunConfig, round_number: int) -> None:
        seed, client, plan = config.sampling_seed, training.client, training.plan
        self.training, self.plan, self._config = training, plan, config
        self.own = training.state if training.rank is None else narrow(training.state, training.rank)
        self.indices = data.train(client)  # corpus positions [n]
        self.count = plan.steps if plan else config.train.local_steps(len(self.indices))
        self.noise = plan.noise_source(random_stream(seed, "noise", client, round_number)) if plan else None
        self.mask_seed = stream_seed(seed, "dropout", client, round_number)  # names the stream of its dropout masks
        self._draws = random_stream(seed, "batches", client, round_number)
        size = config.train.batch_size
        self._fixed = [] if plan else list(fixed_batches(len(self.indices), size, self.count, self._draws))
        self._rate = rate_factor(config, client, data.clients)
        self.executed, self._losses, self._seen, self._clipped = 0, 0.0, 0, 0

    def batch(self, step: int) -> np.ndarray:
        """Corpus positions of one step's examples, drawn in the order of the steps; under a plan possibly none."""
        chosen: np.ndarray = self.indices[self.plan.batch(self._draws) if self.plan else self._fixed[step]]
        return chosen

    def saw(self, examples: int, losses: float, clipped: int) -> None:
        """Count what a step, or a part of one, saw: examples, the sum of their losses, how many were clipped."""
        self._seen, self._losses, self._clipped = self._seen + examples, self._losses + losses, self._clipped + clipped

    def inside(self, names: Iterable[str]) -> State:
        """1 where this client trains, 0 in directions beyond its rank, in the state's shapes."""
        return widen({name: torch.ones_like(self.own[name]) for name in names}, self.training.state)

    def result(self, end: Mapping[str, Tensor], names: Iterable[str], seconds: float) -> Trained:
        """What the client gives back, from the trained tensors ``end`` in the state's shapes.

        Raises Diverged if they hold NaN or infinite values: training diverged.
        """
        if self.training.rank is not None:
            end = narrow(dict(end), self.training.rank)
        update = {name: end[name] - self.own[name] for name in names}
        check_finite(self.training.client, update, self._config.train, self._rate)
        return Trained(update, len(self.indices), self.executed, *self._seen_means, seconds)

    def summed(self, sums: Mapping[str, Tensor], seconds: float) -> Summed:
        """What the client adds to a sum over clients, from sums in the shapes of its own rank: zero beyond it."""
        whole = widen({name: value.to("cpu") for name, value in sums.items()}, self.training.state)
        return Summed(whole, len(self.indices), self.executed, *self._seen_means, seconds)

    @property
    def _seen_means(self) -> tuple[float, float]:
        """Mean loss and clip fraction of the examples seen."""
        loss = self._losses / self._seen if self._seen else math.nan
        return loss, self._clipped / self._seen if self.plan and self._seen else math.nan


def trainable(names: Iterable[str]) -> list[str]:
    """The names in order, each once: a gradient that is added twice would have twice the sensitivity.

    Raises RunFailed if there is none.
    """
    if not (ordered := sorted(set(names))):
        raise RunFailed("nothing is trainable: the strategy trains no adapter factor and train.head is frozen")
    return ordered


def check_finite(client: str, update: State, train: TrainSection, rate: float) -> None:
    """Raises Diverged for an update that holds NaN or infinite values: training diverged. ``rate``: the client's own
    factor of its learning rates.
    """
    if all(bool(torch.isfinite(value).all()) for value in update.values()):
        return
    own = f", or clients.lr, by which it has {rate:g} times that" if rate != 1 else ""
    raise Diverged(f"{client}: local training diverged (NaN or infinite weights); lower train.lr = {train.lr}{own}")
