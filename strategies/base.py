"""Strategy: how the clients' changes become one new state.

Pure, as in optax: ``init(state) -> server_state`` and ``aggregate(state, server_state, updates, weights, round) ->
(state, server_state)``. A strategy knows no Flower, no session and no messages; it changes nothing that it is given and
keeps nothing between calls, so that ``server_state`` is exactly what a checkpoint has to hold. Its file holds its
``Options`` and ``aggregate``; the mathematics is in ``fedlab.lora``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.sections import StrategySection
from fedlab.errors import ConfigError, RunFailed
from fedlab.lora.aggregator import Round, ServerState, Updates, Weights
from fedlab.lora.average import weighted_mean
from fedlab.lora.ranks import widen
from fedlab.lora.server_optimizer import server_step
from fedlab.lora.state import RESIDUAL, State, part_of, select
from fedlab.objectives import check_head, objective_class
from strategies.folding import require_float32
from strategies.moments import moments_of, with_moments
from strategies.options import MeanOptions, NoOptions

__all__ = ["BaseWeights", "Round", "ServerState", "Strategy", "Updates", "Weights"]


class BaseWeights(Protocol):
    """The frozen weights that adapters are added to; ``fedlab.models.loaded.LoadedModel`` is one."""

    scale: dict[str, float]  # module → s of W + s·B·A

    def pristine(self, module: str) -> Tensor:
        """A module's weight [m, n] without any residual, float64."""
        ...

    def leading_inputs(self, module: str, rank: int) -> Tensor:
        """Its ``rank`` leading right singular vectors as orthonormal rows [rank, n]."""
        ...


class Strategy:
    """Base of the strategies. Subclasses set ``trains`` and override ``aggregate``; ``Options`` are their own keys.

    Args:
        config: the run's configuration; ``check`` refuses what makes no sense.
        base: the frozen weights, for strategies that look at them.
    """

    trains: ClassVar[frozenset[str]] = frozenset({"lora_A", "lora_B"})
    # what B·A (and the residual) become; tests/strategies/test_conformance.py holds it
    effective: ClassVar[str] = "product of means"
    # the state carries a residual, which goes down with it
    folds: ClassVar[bool] = False
    # aggregate depends on the updates through their weighted mean alone: what client-level DP can noise, and what a sum
    # over clients suffices for; each strategy says it, and one that says nothing is not
    linear: ClassVar[bool] = False
    # why shared noise is nothing for it although it is linear; "" if it is
    own_steps: ClassVar[str] = ""
    # what clients of lower rank amount to; "" if all must have the same
    ranks: ClassVar[str] = "zero-padded changes"
    # parts that clients train and keep
    personal: ClassVar[frozenset[str]] = frozenset()
    # parts that stay as they are during a task of a stream: sent once, not per round
    static: ClassVar[frozenset[str]] = frozenset()
    # it learns at a task's end what inputs the task used, by the release that its option ``gram`` describes
    reads_inputs: ClassVar[bool] = False
    Options: ClassVar[type[NoOptions]] = MeanOptions
    options: NoOptions

    def __init__(self, config: RunConfig, base: BaseWeights | None = None) -> None:
        self.check(config)
        self.config, self._base = config, base
        self.options = self.Options(**config.strategy.options)

    @property
    def base(self) -> BaseWeights:
        """The frozen weights. Raises ValueError if the strategy was made without."""
        if self._base is None:
            raise ValueError(f"{type(self).__name__} looks at the base model's weights; give them as ``base``")
        return self._base

    @classmethod
    def resolved(cls, config: RunConfig) -> RunConfig:
        """The configuration with the strategy's own keys complete, so that all parties read the same values."""
        own = cls.Options(**config.strategy.options).model_dump(mode="json", exclude_none=True)
        return config.model_copy(update={"strategy": StrategySection(**config.strategy.model_dump() | own)})

    @classmethod
    def reads_public_texts(cls, config: RunConfig) -> bool:
        """Whether the strategy looks at ``lora.public`` under this configuration."""
        return False

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Raise ConfigError for settings that make no sense with this strategy, before anything is started."""
        check_head(config)
        if not cls.trained_parts(config):
            raise ConfigError(_nothing(config))
        if config.privacy.unit == "client" and not cls.linear:
            raise ConfigError(
                f'strategy.name = "{config.strategy.name}" needs each client\'s own factors, but under privacy.unit ='
                ' "client" the server noises one mean; use fedavg, ffa, fedsvd, rolora or head'
            )
        if config.shared_noise and (why := cls.unsummed()):
            raise ConfigError(
                f'privacy.survivors with strategy.name = "{config.strategy.name}": {why}. Under shared noise the server'
                " sees one sum over all clients of gradients at one state; use fedsvd, ffa, fedavg, rolora or head, or"
                " remove privacy.survivors"
            )
        if config.clients.rank and not cls.ranks:
            raise ConfigError(
                f'clients.rank with strategy.name = "{config.strategy.name}": its rule needs equal ranks; use flexlora,'
                " hetlora or flora"
            )
        if config.tasks and cls.personal:
            raise ConfigError(
                f'strategy.name = "{config.strategy.name}" with [[tasks]]: clients keep'
                f" {', '.join(sorted(cls.personal))}, so there is no one model to score after a task; use fedavg"
            )
        if cls.personal and (config.data.canaries is not None or config.evaluate.membership is not None):
            key = "data.canaries" if config.data.canaries is not None else "evaluate.membership"
            raise ConfigError(
                f'{key} with strategy.name = "{config.strategy.name}": clients keep {", ".join(sorted(cls.personal))},'
                " so there is no one model that it could be measured of; remove it"
            )
        for key in ("drift", "prompts"):
            if cls.personal and getattr(config.evaluate, key) is not None:
                raise ConfigError(
                    f'evaluate.{key} with strategy.name = "{config.strategy.name}": clients keep'
                    f" {', '.join(sorted(cls.personal))}, so the server has no whole model to measure; remove it"
                )
        if config.lora.public is not None and config.lora.init_a != "eva" and not cls.reads_public_texts(config):
            raise ConfigError(
                f'lora.public is read for init_a = "eva" (it is "{config.lora.init_a}"), and this strategy reads no'
                ' public texts with these keys; remove it, or set init_a = "eva"'
            )
        if cls.folds:
            require_float32(config)
        if isinstance(options := cls.Options(**config.strategy.options), MeanOptions):
            options.check(config)

    @classmethod
    def unsummed(cls) -> str:
        """Why one sum over the clients' gradients at one state is not enough for its rule; "" if it is."""
        if cls.personal:
            return f"clients keep {', '.join(sorted(cls.personal))}, so they are not at one state"
        return cls.own_steps if cls.linear else "its rule needs each client's own factors"

    # --- a round

    def init(self, state: State) -> ServerState:
        """What the server keeps beside the state, before the first round."""
        return {}

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """The new state, and the server's, from the old ones and the clients' changes.

        Pure: the same arguments give the same bits, and none of them is edited.

        Args:
            state: the global state that the clients started from.
            server_state: what ``init`` or the round before gave.
            updates: client → change of every tensor that it sent.
            weights: client → positive share; they sum to 1.
            round: its number, from 1, and what else is known of it.
        """
        change, server_state = self.change(state, server_state, updates, weights, round)
        return {name: value + change[name] if name in change else value for name, value in state.items()}, server_state

    def change(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """The clients' mean change, in the state's shapes, after the robust rule and the server's optimiser if any."""
        full = {client: widen(update, state) for client, update in updates.items()}
        if not isinstance(self.options, MeanOptions):
            return weighted_mean(full, weights), server_state
        try:
            mean = self.options.combine(full, weights, round.unusable)
        except ValueError as error:
            raise RunFailed(f"the clients' mean: {error}") from None
        if self.options.server is None:
            return mean, server_state
        mean, moments = server_step(self.options.server, mean, moments_of(server_state))
        return mean, with_moments(server_state, moments)

    def client_ranks(self, server_state: ServerState) -> dict[str, int]:
        """client → rank of its adapter in the next round, for those that the strategy gave another than at first."""
        return {}

    # --- what travels

    def trained_names(self, state: State, round_number: int = 1) -> list[str]:
        """Names of the tensors that clients train in a round."""
        return sorted(select(state, self.trained_parts(self.config)))

    def sent_names(self, state: State, round_number: int = 1) -> list[str]:
        """Those of them that they send back."""
        return [name for name in self.trained_names(state, round_number) if part_of(name) not in self.personal]

    def travelling(self, state: State) -> State:
        """What goes to the clients in every round."""
        return {name: value for name, value in state.items() if part_of(name) not in self.static}

    @classmethod
    def trained_parts(cls, config: RunConfig) -> list[str]:
        """``lora_A``, ``lora_B``, ``head``: all that clients are ever asked to train, a privacy plan's scope."""
        head = config.train.head == "train" and objective_class(config.objective.name).has_head
        return sorted(cls.factors(config) | ({"head"} if head else set()))

    @classmethod
    def factors(cls, config: RunConfig) -> frozenset[str]:
        """Which factors are trained under this configuration."""
        return cls.trains

    # --- a stream of tasks

    def begin_task(self, state: State, memory: Mapping[str, Tensor], task: int) -> State:
        """The state that a task of a stream starts from; default: go on with the adapter.

        Args:
            state: a fresh one.
            memory: what ``end_task`` of the task before gave; empty at the first.
            task: its number, from 0.
        """
        return state | {name: value for name, value in memory.items() if name in state or part_of(name) in RESIDUAL}

    def end_task(self, state: State, memory: Mapping[str, Tensor], grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the next task needs to know.

        Args:
            state: after the task's last round.
            memory: what the task began with.
            grams: module → [n, n], the sum of its inputs' outer products, for strategies that read inputs.
        """
        return dict(state)


def _nothing(config: RunConfig) -> str:
    """Why a strategy that trains the head alone trains nothing."""
    why = (
        'train.head = "freeze"'
        if config.train.head == "freeze"
        else f'objective.name = "{config.objective.name}": this objective trains no head'
    )
    return f'strategy.name = "{config.strategy.name}" trains the head alone, but {why}; take a strategy with an adapter'
