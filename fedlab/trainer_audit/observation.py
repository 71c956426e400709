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
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedlab.config import RunConfig
from fedlab.data import FederatedData
from fedlab.data.collate import Tokens
from fedlab.data.partition import Shards
from fedlab.errors import ConfigError
from fedlab.lora.state import PARTS, State, part_of
from fedlab.models.adapters import initial_state
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.noise import GaussianNoise
from fedlab.privacy.plan import DPPlan
from fedlab.session import Session
from fedlab.train import trainer  # by module: what is run is whatever the module holds now
from fedlab.train.dp import PerExampleGradients

SHORT_TEXT = 2  # tokens of a record whose gradient is given
PREFIX = 1024  # elements of each tensor that are kept per step; the returned update is kept whole
DEFAULT_PARTS = ("lora_B", "head")


@dataclass(frozen=True)
class Subject:
    """What is audited: the process's model, one client's data, and the tensors that it trains from ``state``."""

    session: Session
    client: str
    config: RunConfig  # the session's, with plain SGD and the audit's seed
    state: State
    names: tuple[str, ...]  # sorted

    @property
    def model(self) -> LoadedModel:
        """The process's one model."""
        return self.session.model

    @cached_property
    def sizes(self) -> np.ndarray:
        """Elements of each trained tensor, in the order of ``names``."""
        return np.array([self.state[name].numel() for name in self.names])

    def plan(self, n: int, batch_size: float, steps: int, **change: Any) -> RecordedPlan:
        """The client's own plan for n records, ``batch_size`` of them expected per step; σ, C, δ and the noise source
        are the client's.

        Raises ConfigError where the run is not private.
        """
        own = self.session.plan(self.client)
        if own is None:
            raise ConfigError(
                'privacy.unit = "none" adds no noise: there is nothing to audit; set privacy.unit = "example"'
            )
        values = {
            "n": n,
            "batch_size": batch_size,
            "steps": steps,
            "sigma": own.sigma,
            "clip": own.clip,
            "delta": own.delta,
        }
        return RecordedPlan(**{**values, "participations": 1, "noise": own.noise, **change})


def subject(
    session: Session, client: str | None = None, seed: int = 0, parts: Iterable[str] = DEFAULT_PARTS
) -> Subject:
    """Make a ``Subject``: the first client unless named; the trained tensors of ``parts`` (``lora_A``, ``lora_B``,
    ``head``).

    Raises ConfigError for an unknown client or part, and for parts that leave nothing to train.
    """
    client = session.data.clients[0] if client is None else client
    if client not in session.data.clients:
        raise ConfigError(
            f"client {client!r} is unknown; there are {session.data.clients[0]} to {session.data.clients[-1]}"
        )
    wanted = set(parts) - ({"head"} if session.config.train.head == "freeze" else set())
    if unknown := wanted - set(PARTS):
        raise ConfigError(f"unknown part {sorted(unknown)[0]!r}; known: {', '.join(PARTS)}")
    names = tuple(sorted(name for name in session.model.parameters if part_of(name) in wanted))
    if not names:
        raise ConfigError(f"nothing is trained among {', '.join(sorted(wanted)) or 'no parts'}")
    plain = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "prox": 0.0,
        "schedule": "constant",
        "warmup_rounds": 0,
    }
    train = session.config.train.model_copy(update={**plain, "head_lr": None})
    config = session.config.model_copy(
        update={"train": train, "run": session.config.run.model_copy(update={"seed": seed})}
    )
    return Subject(session, client, config, initial_state(session.model, config.lora, seed), names)


@dataclass(frozen=True)
class Records:
    """A client's records. Positions 0 … len(real) − 1 are real examples; the m after them have the gradients given
    here.

    Record len(real) + j has ``size[j]`` at element ``element[j]`` of tensor ``tensor[j]`` and zeros elsewhere, unless
    ``dense`` has its whole gradient under its position.
    """

    text: int  # position in the corpus; its first two tokens are the text of every record that is not real
    real: np.ndarray  # positions in the corpus; may be empty
    tensor: np.ndarray  # [m] index into Subject.names
    element: np.ndarray  # [m]
    size: np.ndarray  # [m]; 0 for a record that is zeroed out
    dense: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Records in all."""
        return len(self.real) + len(self.size)

    @classmethod
    def zeros(cls, text: int, count: int) -> Records:
        """``count`` records, all zeroed out: what is released of them is noise alone."""
        nothing = np.zeros(count, dtype=np.int64)
        return cls(text, np.array([], dtype=np.int64), nothing, nothing, np.zeros(count))


@dataclass
class Log:
    """What was seen of one ``train_client``. Lists have one entry per optimiser step unless said otherwise."""

    positions: list[np.ndarray] = field(default_factory=list)  # records whose gradients were computed
    released: list[np.ndarray] = field(
        default_factory=list
    )  # (w before − w after)·normaliser/lr: Σ clipped + noise, prefixes joined
    calls: int = 0  # of privatise
    squares: dict[str, float] = field(default_factory=dict)  # per tensor, Σ of the noise of every call, squared
    elements: dict[str, int] = field(default_factory=dict)  # per tensor, how many numbers that was
    private: dict[str, Tensor] = field(default_factory=dict)  # per tensor, Σ over calls of what privatise returned
    heads: list[np.ndarray] = field(
        default_factory=list
    )  # per call, the noise of each tensor's prefix, joined (float64, exact)
    forwards: list[np.ndarray] = field(
        default_factory=list
    )  # positions of each forward pass of the step that is under way


@dataclass(frozen=True)
class RecordedPlan(DPPlan):
    """A ``DPPlan`` that writes to ``log``."""

    log: Log = field(default_factory=Log)
    absent: int | None = None  # position that never enters a batch: the add/remove neighbour
    blind: bool = (
        False  # privatise gets zeros instead of the sum, so that what it returns does not depend on any record
    )

    def batch(self, rng: np.random.Generator) -> np.ndarray:
        """See ``DPPlan.batch``."""
        drawn = super().batch(rng)
        return drawn if self.absent is None else drawn[drawn != self.absent]

    def privatise(self, clipped_sum: Mapping[str, Tensor], noise: GaussianNoise) -> dict[str, Tensor]:
        """See ``DPPlan.privatise``."""
        given = {name: total.detach().double() * (not self.blind) for name, total in clipped_sum.items()}  # a copy
        result = super().privatise({name: value.clone() for name, value in given.items()}, noise)
        self.log.calls += 1
        heads = []
        for name, value in sorted(result.items()):
            added = value.double() * self.normaliser - given[name]
            self.log.squares[name] = self.log.squares.get(name, 0.0) + float(added.square().sum())
            self.log.elements[name] = self.log.elements.get(name, 0) + added.numel()
            self.log.private[name] = self.log.private[name] + value if name in self.log.private else value.clone()
            heads.append(added.flatten()[:PREFIX].cpu().numpy())
        self.log.heads.append(np.concatenate(heads))
        return result


@dataclass(frozen=True)
class Observation:
    """One run: what was released, and the log."""

    released: dict[str, Tensor]  # −update·normaliser/lr, float64: Σ over steps of (Σ clipped + noise)
    update: State
    lr: float
    plan: RecordedPlan
    log: Log

    def flat(self) -> np.ndarray:
        """``released`` as one vector, tensors in the order of their names."""
        return np.concatenate([value.flatten().numpy() for _, value in sorted(self.released.items())])


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
    meaning. Raises what ``train_client`` raises.
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
