"""Run the real ``train_client`` on records whose gradients we dictate, and write down what comes out. For audits and
tests only.

Three things are put in from outside, and nothing of the trainer is replaced:

- the data: a few real examples of the client, then any number of two-token records (``Records``);
- ``per_example``: ``take()`` runs as in production, then the rows of those records are overwritten (canaries,
  adversaries);
- the plan: a ``DPPlan`` that also writes down what goes into ``privatise`` and what comes out (``RecordedPlan``).

What is *released* is read elsewhere: weights after each optimiser step by torch's own hook, and the update that the
trainer returns. So a trainer that goes round the plan, or a plan that says one thing and does another, is seen. The
learning rate is chosen so that the update is in units of C: −update = scale·Σ over steps of (Σ clipped + noise)/C,
which keeps float32 weights from rounding the noise away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedlab.data import FederatedData
from fedlab.data.collate import Tokens
from fedlab.data.partition import Shards
from fedlab.models.loaded import LoadedModel
from fedlab.train import trainer  # by module: what is run is whatever the module holds now
from fedlab.train.dp import PerExampleGradients
from fedlab.trainer_audit.subject import (
    DEFAULT_PARTS,
    PREFIX,
    Log,
    Observation,
    RecordedPlan,
    Records,
    Subject,
    subject,
)
from fedlab.trainer_audit.sum_observation import observe_sum

__all__ = ["DEFAULT_PARTS", "PREFIX", "Log", "Observation", "RecordedPlan", "Records", "Subject", "observe", "subject"]
SHORT_TEXT = 2  # tokens of a record whose gradient is given


class _LoggedTokens(Tokens):
    """Tokens that write down which records go forward together."""

    def __init__(self, source: Tokens, records: Records, log: Log) -> None:
        texts = np.concatenate([records.real, np.full(len(records.size), records.text)])
        longest = np.concatenate([source.lengths(records.real), np.full(len(records.size), SHORT_TEXT)])
        taken = source.take(texts, longest)
        super().__init__(taken.ids, taken.offsets, taken.labels, taken.types, taken.label_offsets)
        object.__setattr__(self, "_log", log)

    def batch(self, indices: np.ndarray, pad_id: int) -> dict[str, Tensor]:
        self._log.forwards.append(np.asarray(indices))  # type: ignore[attr-defined]
        return super().batch(indices, pad_id)


class _Dictated(PerExampleGradients):
    """Per-example gradients of which some rows are overwritten, after everything that production does."""

    def __init__(
        self, model: LoadedModel, names: Iterable[str], names_known: tuple[str, ...], records: Records, log: Log
    ) -> None:
        super().__init__(model, names)
        self._known, self._records, self._log = names_known, records, log

    def take(self) -> dict[str, Tensor]:
        gradients, records, positions = super().take(), self._records, self._log.forwards[-1]
        rows = np.flatnonzero(positions >= len(records.real))
        which = positions[rows] - len(records.real)
        for index, name in enumerate(self._known):
            shape = gradients[name].shape
            if shape[0] != len(positions):
                raise RuntimeError(f"{name}: {shape[0]} gradients for {len(positions)} records")
            flat = gradients[name].flatten(1).clone()
            flat[rows] = 0
            mine = (records.tensor[which] == index) & (records.size[which] != 0)
            flat[rows[mine], records.element[which[mine]]] = torch.from_numpy(records.size[which[mine]]).to(flat)
            for row in rows:
                if int(positions[row]) in records.dense:
                    flat[row] = records.dense[int(positions[row])][name].flatten().to(flat)
            gradients[name] = flat.view(shape)
        return gradients


def observe(
    who: Subject,
    records: Records,
    plan: RecordedPlan,
    client: str | None = None,
    round_number: int = 1,
    scale: float = 1.0,
    as_configured: bool = False,
) -> Observation:
    """One real ``train_client`` over ``records`` under ``plan``. Its update is Σ (Σ clipped + noise)/C, times
    −``scale``.

    ``as_configured`` keeps the run's optimiser, learning rates and prox; of the result only ``update`` then has a
    meaning. Under shared noise it is the sum that the server sees, of as many rounds (``sum_observation``). Raises what
    ``train_client`` raises.
    """
    client, log = who.client if client is None else client, Log()
    plan = replace(plan, log=log)
    lr = scale * plan.normaliser / plan.clip
    train = who.session.config.train if as_configured else who.config.train.model_copy(update={"lr": lr})
    no_dropout = who.config.lora.model_copy(
        update={"dropout": 0.0}
    )  # gradients of the same record are then comparable between runs
    config = who.config.model_copy(update={"train": train, "lora": no_dropout})
    own = np.arange(records.count)
    tokens = _LoggedTokens(who.session.data.tokens, records, log)
    nobody = np.array([], dtype=np.int64)
    data = FederatedData(tokens, Shards({client: own}, {client: nobody}, nobody))
    factory: Callable[..., PerExampleGradients] = partial(_Dictated, names_known=who.names, records=records, log=log)
    if plan.shared is not None:
        return observe_sum(who, data, plan, client, round_number, config, factory)
    with _watch(who, log, plan.normaliser / lr):
        found = trainer.train_client(
            who.model, data, client, who.state, who.names, config, round_number, plan, per_example=factory
        )
    released = {name: value.double() * (-plan.normaliser / lr) for name, value in found.update.items()}
    return Observation(released, found.update, lr, plan, log)


@contextmanager
def _watch(who: Subject, log: Log, factor: float) -> Iterator[None]:
    """After every optimiser step, whoever makes it: how the weights moved, and which records went forward since the
    last one.
    """

    def weights(values: Mapping[str, Tensor]) -> np.ndarray:
        return np.concatenate([values[name].detach().flatten()[:PREFIX].double().cpu().numpy() for name in who.names])

    last = [weights(who.state)]

    def after(*_: object) -> None:
        now = weights(who.model.parameters)
        log.released.append((last[0] - now) * factor)
        log.positions.append(np.concatenate([np.array([], dtype=np.int64), *log.forwards]))
        last[0] = now
        log.forwards.clear()

    handle = register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        handle.remove()


def clipped_gradient(who: Subject, position: int, clip: float) -> tuple[dict[str, Tensor], float]:
    """The clipped gradient of one real example (position in the corpus) by plain autograd, in float64, and its norm
    before clipping.

    Shares no code with the trainer but the model itself: it is what the trainer's contribution of that record is held
    against.
    """
    model, tokens = who.model, who.session.data.tokens
    model.load(who.state)
    parameters = [model.parameters[name].requires_grad_() for name in who.names]
    try:
        batch = tokens.batch(np.array([position]), model.tokenizer.pad_token_id)
        (loss,) = model.objective.per_example_loss(model, batch)
        gradients = [gradient.double().cpu() for gradient in torch.autograd.grad(loss, parameters)]
    finally:
        model.module.requires_grad_(False)
    norm = float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())
    factor = min(1.0, clip / norm) if norm > 0 else 1.0
    return {name: gradient * factor for name, gradient in zip(who.names, gradients, strict=True)}, norm
