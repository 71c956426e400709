"""Who is audited, with which plan, and what was seen: what the audit's observations are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.state import PARTS, State, part_of
from fedlab.models.adapters import initial_state
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.accounting import Event
from fedlab.privacy.discrete_gaussian import Words
from fedlab.privacy.noise import GaussianNoise
from fedlab.privacy.plan import DPPlan
from fedlab.session import Session

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
        values: dict[str, Any] = {
            "n": n,
            "batch_size": batch_size,
            "steps": steps if own.shared is None else 1,
            "sigma": own.sigma,
            "clip": own.clip,
            "delta": own.delta,
        }
        if own.shared is not None:
            values |= {"shared": own.shared, "rate": min(1.0, batch_size / n), "rounds": steps}
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
    # privatise, or share_of, gets zeros instead of the sum, so that what it returns does not depend on any record
    blind: bool = False
    rounds: int = 1  # under shared noise, where a round has one step

    def event(self, rounds: int = 1) -> Event:
        """See ``DPPlan.event``; of all that is observed."""
        return super().event(rounds * self.rounds)

    def of_steps(self, count: int) -> RecordedPlan:
        """The same plan, observed over so many steps."""
        return replace(self, steps=count) if self.shared is None else replace(self, rounds=count)

    def batch(self, rng: np.random.Generator) -> np.ndarray:
        """See ``DPPlan.batch``."""
        drawn = super().batch(rng)
        return drawn if self.absent is None else drawn[drawn != self.absent]

    def share_of(self, clipped_sum: Mapping[str, Tensor], dimension: int, source: Words) -> dict[str, np.ndarray]:
        """See ``DPPlan.share_of``."""
        self.log.calls += 1
        given = {name: total * (not self.blind) for name, total in clipped_sum.items()}
        return super().share_of(given, dimension, source)

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
