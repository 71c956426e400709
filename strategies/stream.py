"""What strategies for a stream of tasks share: what earlier tasks use stays as it is.

Each is a way to choose, once per task, in which subspace the clients train; within it B is averaged, which is exact.
``begin_task`` gives the state that a task starts from, ``end_task`` what the next one needs to know (``memory``: state
tensors, and ``<module>.protected`` [k, n], the orthonormal rows whose inputs no later task may touch). Strategies that
are not made for streams go on with the adapter they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.tasks import Gram
from fedlab.continual.sketch import noise_floor
from fedlab.continual.subspace import extend
from fedlab.errors import ConfigError
from fedlab.lora.state import BASIS, RESIDUAL, State, effective_delta, modules, outer_b, part_of, select
from strategies.base import BaseWeights, Strategy
from strategies.folding import fold, require_float32
from strategies.options import MeanOptions

PROTECTED = "protected"
Memory = Mapping[str, Tensor]


class InputsOptions(MeanOptions):
    """[strategy] keys of strategies that protect the inputs of earlier tasks."""

    energy: float = Field(default=0.98, gt=0, le=1, description="share of a task's input energy to protect")
    free: int = Field(default=16, gt=0, description="input directions that must be left to train in")
    gram: Gram = Gram()


class FixedBases(Strategy):
    """Base of the strategies whose A, and perhaps left basis, are fixed for a task: clients train B alone."""

    static: ClassVar[frozenset[str]] = frozenset({"lora_A", BASIS, *RESIDUAL})
    trains: ClassVar[frozenset[str]] = frozenset({"lora_B"})
    effective: ClassVar[str] = "mean of products, exactly"
    linear: ClassVar[bool] = True
    ranks: ClassVar[str] = ""

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """A stream, and layers that can be trained in coordinates."""
        super().check(config)
        check_stream(config)

    def end_task(self, state: State, memory: Memory, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the task taught, folded into the residual, and the heads."""
        return merged(state)


def check_stream(config: RunConfig) -> None:
    """Raises ConfigError for what a strategy that is made for streams cannot do."""
    name = config.strategy.name
    if not config.tasks:
        raise ConfigError(f'strategy.name = "{name}" needs a stream: add [[tasks]], or use fedsvd or ffa for one task')
    if config.train.gradients != "fused":
        raise ConfigError(f'strategy.name = "{name}" needs train.gradients = "fused", got "{config.train.gradients}"')
    require_float32(config)


def check_release(config: RunConfig, gram: Gram) -> None:
    """Raises ConfigError where inputs cannot be released at a task's end; nothing is if all tasks come at once."""
    if config.stream.joint:
        return
    if config.privacy.unit == "client":
        raise ConfigError(
            f'strategy.name = "{config.strategy.name}" with privacy.unit = "client": what it asks at a task\'s end is'
            ' noised per example; use unit = "example", or osft, which looks at weights alone'
        )
    if not config.private and not gram.clear and config.population < gram.min_clients:
        raise ConfigError(
            f"strategy.gram.min_clients = {gram.min_clients} with data.clients = {config.population}: "
            "sums would be of too few"
        )


def carried(state: State, memory: Memory) -> State:
    """A fresh adapter on what earlier tasks left: their residual and heads."""
    return state | {
        name: value for name, value in memory.items() if name.startswith("head.") or name.rpartition(".")[2] in RESIDUAL
    }


def merged(state: State) -> State:
    """What a task taught, folded into the residual, and the heads."""
    for module in modules(state):
        state = fold(state, module, (outer_b(state, module), state[f"{module}.lora_A"]))
    return select(state, ("head", *RESIDUAL))


def placed(state: State, module: str, A: Tensor, basis: Tensor | None = None) -> State:
    """The state with this A, B = 0 to go with it, and, if given, the coordinates of B."""
    m = len(state[f"{module}.lora_B"]) if basis is None else len(basis)
    result = state | {f"{module}.lora_A": A.float(), f"{module}.lora_B": torch.zeros(m, len(A))}
    return result if basis is None else result | {f"{module}.{BASIS}": basis.float()}


def protected(memory: Memory, state: State, module: str) -> Tensor:
    """The module's protected rows [k, n]; none before the first task's end."""
    return memory.get(f"{module}.{PROTECTED}", torch.zeros(0, state[f"{module}.lora_A"].shape[1]))


def grown(
    config: RunConfig, options: InputsOptions, state: State, memory: Memory, grams: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The protected rows after a task.

    Args:
        config: of the run.
        options: the strategy's own.
        state: after the task.
        memory: what the task began with.
        grams: module → [n, n], the sum over clients that was released. Where there is none, after the last task, rows
            stay as they are.
    """
    gram, left_free = options.gram, max(options.free, config.lora.rank)
    result = {}
    for module in modules(state):
        rows = protected(memory, state, module)
        if module in grams:
            n = rows.shape[1]
            floor = noise_floor(n, gram.sigma, gram.clip, config.population) if config.private else 0.0
            rows = extend(rows, grams[module], options.energy, n - left_free, floor, module)
        result[f"{module}.{PROTECTED}"] = rows
    return result


def current_weight(base: BaseWeights, state: State, module: str) -> Tensor:
    """W + s·residual [m, n], float64: the weight that a task starts from."""
    empty = {f"{module}.lora_B": state[f"{module}.lora_B"] * 0, f"{module}.lora_A": state[f"{module}.lora_A"]}
    whole = empty | {
        name: v for name, v in state.items() if name.rpartition(".")[0] == module and part_of(name) in RESIDUAL
    }
    return base.pristine(module) + effective_delta(
        {k: v.double() for k, v in whole.items()}, module, base.scale[module]
    )
