"""The run's optimiser, fresh in every round: torch's own for one client, and the same steps for stacked clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedlab.config.sections import TrainSection

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's, torch's defaults


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


def rates(train: TrainSection, names: Iterable[str], factor: float) -> list[tuple[float, list[str]]]:
    """(learning rate, the tensors that it is for): the head's, and the adapter's.

    Groups without a tensor are left out.
    """
    head = {name for name in names if name.startswith("head.")}
    head_lr = train.lr if train.head_lr is None else train.head_lr
    groups = [(head_lr * factor, sorted(head)), (train.lr * factor, sorted(set(names) - head))]
    return [(lr, group) for lr, group in groups if group]


def make_optimizer(
    train: TrainSection, parameters: Mapping[str, torch.nn.Parameter], names: Sequence[str], factor: float
) -> torch.optim.Optimizer:
    """torch's optimiser of the parameters ``names``; their learning rates are multiplied with ``factor``."""
    groups = [{"params": [parameters[n] for n in group], "lr": lr} for lr, group in rates(train, names, factor)]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=train.weight_decay)
    return torch.optim.SGD(groups, momentum=train.momentum, weight_decay=train.weight_decay)


class StackedOptimizer:
    """The run's optimiser on stacked tensors [K, *shape]: elementwise, so each client's steps are its own.

    Args:
        tensors: name → [K, *shape], changed in place.
        factor: what all learning rates are multiplied with.
        factors: [K], and each client's own. A step is linear in its rate, so it is the step that is scaled.
    """

    def __init__(
        self, train: TrainSection, names: Sequence[str], tensors: dict[str, Tensor], factor: float, factors: Tensor
    ) -> None:
        self._train, self._tensors, self._factors = train, tensors, factors
        self._scaled = not bool((factors == 1).all())
        self._groups = rates(train, names, factor)
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], active: int) -> None:
        """One step of the first ``active`` clients of the stack."""
        before = {n: self._tensors[n][:active].clone() for n in gradients} if self._scaled else {}
        for lr, names in self._groups:
            values, grads = [self._tensors[n][:active] for n in names], [gradients[n] for n in names]
            (self._adamw if self._train.optimizer == "adamw" else self._sgd)(names, values, grads, lr, active)
        self._steps += 1
        for name, start in before.items():
            value = self._tensors[name][:active]
            factors = self._factors[:active].to(value.dtype).view(-1, *[1] * (value.ndim - 1))
            value.copy_(start + factors * (value - start))

    def _adamw(self, names: list[str], values: list[Tensor], grads: list[Tensor], lr: float, active: int) -> None:
        for n in names:
            self._first.setdefault(n, torch.zeros_like(self._tensors[n]))
            self._second.setdefault(n, torch.zeros_like(self._tensors[n]))
        adamw(
            values,
            grads,
            [self._first[n][:active] for n in names],
            [self._second[n][:active] for n in names],
            [],
            [torch.tensor(float(self._steps)) for _ in names],
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=self._train.weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def _sgd(self, names: list[str], values: list[Tensor], grads: list[Tensor], lr: float, active: int) -> None:
        buffers: list[Tensor | None] = [self._first[n][:active] if n in self._first else None for n in names]
        sgd(
            values,
            grads,
            buffers,
            weight_decay=self._train.weight_decay,
            momentum=self._train.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if self._train.momentum and self._steps == 0:
            self._first |= {n: b for n, b in zip(names, buffers, strict=True) if b is not None}
