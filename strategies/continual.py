"""Strategies for a stream of tasks: what earlier tasks use stays as it is.

Each is a way to choose, once per task, in which subspace the clients train; within it B is averaged, which is exact.
``begin_task`` gives the state that a task starts from, ``end_task`` what the next one needs to know (``memory``: state
tensors, and ``<module>.protected`` [k, n], the orthonormal rows whose inputs no later task may touch). Strategies that
are not here go on with the adapter they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.tasks import Gram
from fedlab.continual.importance import layer_importance, preserved_ranks
from fedlab.continual.subspace import CapacityExhausted, complement, extend, leading_triplets
from fedlab.errors import ConfigError
from fedlab.lora.state import BASIS, PAST, RESIDUAL, State, effective_delta, modules, outer_b, part_of, select
from fedlab.lora.subspace import open_rows
from fedlab.lora.svd import principal_rows
from fedlab.models.activations import public_batches
from fedlab.models.adapters import draw_a
from fedlab.models.loaded import LoadedModel
from fedlab.seeds import stream_seed
from strategies.base import LoraStrategy
from strategies.fedsvd import FedSVD, FedSVDOptions
from strategies.folding import fold, require_float32
from strategies.options import MeanOptions, NoOptions

PROTECTED = "protected"
LOWEST = 0.1  # share that OSFT preserves of a layer of no importance
Memory = Mapping[str, Tensor]


class OSFTOptions(MeanOptions):
    """[strategy] keys of OSFT."""

    preserve: float = Field(
        default=0.5, ge=0, lt=1, description="share of every layer's singular directions that a task may not touch"
    )
    importance: bool = Field(
        default=False, description="less of it where lora.public shows that a layer changes its input much"
    )


class InputsOptions(MeanOptions):
    """[strategy] keys of strategies that protect the inputs of earlier tasks."""

    energy: float = Field(default=0.98, gt=0, le=1, description="share of a task's input energy to protect")
    free: int = Field(default=16, gt=0, description="input directions that must be left to train in")
    gram: Gram = Gram()


class FedSVDContinualOptions(FedSVDOptions, InputsOptions):
    """[strategy] keys of FedSVD in the complement of the protected inputs."""


class _InTasks(LoraStrategy):
    """Refuses what does not go with bases that are fixed for a task."""

    static: ClassVar[frozenset[str]] = frozenset({"lora_A", BASIS, *RESIDUAL})
    trains: ClassVar[frozenset[str]] = frozenset({"lora_B"})
    effective: ClassVar[str] = "mean of products, exactly"
    ranks: ClassVar[str] = ""

    @classmethod
    def check(cls, config: RunConfig) -> None:
        super().check(config)
        _check(config)

    def end_task(self, state: State, memory: Memory, grams: dict[str, Tensor]) -> dict[str, Tensor]:
        return merged(state)


def _check(config: RunConfig) -> None:
    name = config.strategy.name
    if not config.tasks:
        raise ConfigError(f'strategy.name = "{name}" needs a stream: add [[tasks]], or use fedsvd or ffa for one task')
    if config.train.gradients != "fused":
        raise ConfigError(f'strategy.name = "{name}" needs train.gradients = "fused", got "{config.train.gradients}"')
    if config.gram is not None and config.privacy.unit == "client":
        raise ConfigError(
            f'strategy.name = "{name}" with privacy.unit = "client": what it asks at a task\'s end is noised per'
            ' example; use unit = "example", or osft, which looks at weights alone'
        )
    if (
        (gram := config.gram) is not None
        and not config.private
        and not gram.clear
        and config.population < gram.min_clients
    ):
        raise ConfigError(
            f"strategy.gram.min_clients = {gram.min_clients} with data.clients = {config.population}: "
            "sums would be of too few"
        )
    require_float32(config)


class OSFT(_InTasks):
    """ΔW = Uᵀ·C·V with U, V bases of what the ``preserve`` leading singular vectors of the current weight leave (arXiv
    2504.07097).
    """

    Options: ClassVar[type[NoOptions]] = OSFTOptions

    @classmethod
    def check(cls, config: RunConfig) -> None:
        super().check(config)
        if OSFTOptions(**config.strategy.options).importance and config.lora.public is None:
            raise ConfigError("strategy.importance = true needs lora.public, a file of public texts; or remove it")

    @classmethod
    def begin_task(cls, config: RunConfig, state: State, memory: Memory, model: LoadedModel, task: int) -> State:
        options = OSFTOptions(**config.strategy.options)
        state = carried(state, memory)
        weights = {module: current_weight(model, state, module) for module in modules(state)}
        relative = None
        if options.importance:
            model.load(state)
            relative = layer_importance(model, public_batches(model, config.lora))
        shapes = {module: (weight.shape[0], weight.shape[1]) for module, weight in weights.items()}
        kept = preserved_ranks(shapes, relative, min(LOWEST, options.preserve), options.preserve)
        for module, weight in weights.items():
            top = leading_triplets(weight, kept[module])
            state = _placed(state, module, complement(top.right.float()), complement(top.left.float()))
        return state


class OSFTData(_InTasks):
    """ΔW = C·V with V a basis of all inputs that no earlier task used: as plastic as can be, and exact on protected
    inputs.
    """

    Options: ClassVar[type[NoOptions]] = InputsOptions

    @classmethod
    def begin_task(cls, config: RunConfig, state: State, memory: Memory, model: LoadedModel, task: int) -> State:
        state = carried(state, memory)
        for module in modules(state):
            state = _placed(state, module, complement(protected(memory, state, module)))
        return state

    def end_task(self, state: State, memory: Memory, grams: dict[str, Tensor]) -> dict[str, Tensor]:
        return merged(state) | grown(self.config, state, memory, grams, InputsOptions(**self.config.strategy.options))


class FullFineTuning(_InTasks):
    """The adapted layers' whole weights, nothing protected: ΔW = C. A baseline that forgets."""

    @classmethod
    def begin_task(cls, config: RunConfig, state: State, memory: Memory, model: LoadedModel, task: int) -> State:
        state = carried(state, memory)
        for module in modules(state):
            state = _placed(state, module, torch.eye(state[f"{module}.lora_A"].shape[1]))
        return state


class FedSVDContinual(FedSVD):
    """FedSVD whose A is orthonormal inside the complement of the protected inputs: B is trained, refactorising stays in
    A's span.
    """

    Options: ClassVar[type[NoOptions]] = FedSVDContinualOptions
    static: ClassVar[frozenset[str]] = frozenset(RESIDUAL)
    ranks: ClassVar[str] = ""

    @classmethod
    def check(cls, config: RunConfig) -> None:
        super().check(config)
        _check(config)
        if FedSVDContinualOptions(**config.strategy.options).refresh is not None:
            raise ConfigError(
                "strategy.refresh with fedsvd-continual: new directions would leave the complement; remove it"
            )

    @classmethod
    def begin_task(cls, config: RunConfig, state: State, memory: Memory, model: LoadedModel, task: int) -> State:
        state = carried(state, memory)
        for module in modules(state):
            kept, n = protected(memory, state, module), state[f"{module}.lora_A"].shape[1]
            if config.lora.rank > n - len(kept):
                raise CapacityExhausted(
                    f"{module}: {len(kept)} of {n} input directions are protected, lora.rank = {config.lora.rank} more"
                    " are needed; lower the rank or strategy.energy, or end the stream here"
                )
            candidates = _candidates(config, state, model, module, kept, task)
            state = _placed(state, module, open_rows(kept, candidates, config.lora.rank))
        return state

    def end_task(self, state: State, memory: Memory, grams: dict[str, Tensor]) -> dict[str, Tensor]:
        return merged(state) | grown(
            self.config, state, memory, grams, FedSVDContinualOptions(**self.config.strategy.options)
        )


class OLoRA(LoraStrategy):
    """A new adapter per task, kept off the earlier ones' A by ``stream.penalty`` (arXiv 2310.14152).

    Soft: not exact.
    """

    static: ClassVar[frozenset[str]] = frozenset({*RESIDUAL, PAST})
    ranks: ClassVar[str] = ""

    @classmethod
    def check(cls, config: RunConfig) -> None:
        super().check(config)
        _check(config)

    @classmethod
    def begin_task(cls, config: RunConfig, state: State, memory: Memory, model: LoadedModel, task: int) -> State:
        state = carried(state, memory) | {name: value for name, value in memory.items() if name.endswith(f".{PAST}")}
        for module in modules(state):
            A = state[f"{module}.lora_A"]
            state = _placed(state, module, draw_a("kaiming", tuple(A.shape), config.run.seed, "task", task, module))
        return state

    def end_task(self, state: State, memory: Memory, grams: dict[str, Tensor]) -> dict[str, Tensor]:
        past = {
            f"{m}.{PAST}": [v for v in (state.get(f"{m}.{PAST}"), state[f"{m}.lora_A"]) if v is not None]
            for m in modules(state)
        }
        return merged(state) | {name: torch.cat(values) for name, values in past.items()}


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


def protected(memory: Memory, state: State, module: str) -> Tensor:
    """The module's protected rows [k, n]; none before the first task's end."""
    return memory.get(f"{module}.{PROTECTED}", torch.zeros(0, state[f"{module}.lora_A"].shape[1]))


def grown(
    config: RunConfig,
    state: State,
    memory: Memory,
    grams: dict[str, Tensor],
    options: InputsOptions | FedSVDContinualOptions,
) -> dict[str, Tensor]:
    """The protected rows after a task, from the Gram matrices that the clients released; as before where there are none
    (last task).
    """
    from fedlab.continual.sketch import noise_floor

    gram, room = config.gram, max(options.free, config.lora.rank)
    result = {}
    for module in modules(state):
        rows = protected(memory, state, module)
        if module in grams and gram is not None:
            n = rows.shape[1]
            floor = noise_floor(n, gram.sigma, gram.clip, config.population) if config.private else 0.0
            rows = extend(rows, grams[module], options.energy, n - room, floor, module)
        result[f"{module}.{PROTECTED}"] = rows
    return result


def current_weight(model: LoadedModel, state: State, module: str) -> Tensor:
    """W + s·residual [m, n], float64: the weight that a task starts from."""
    empty = {f"{module}.lora_B": state[f"{module}.lora_B"] * 0, f"{module}.lora_A": state[f"{module}.lora_A"]}
    whole = empty | {
        name: v for name, v in state.items() if name.rpartition(".")[0] == module and part_of(name) in RESIDUAL
    }
    return model.pristine(module) + effective_delta(
        {k: v.double() for k, v in whole.items()}, module, model.scale[module]
    )


def _placed(state: State, module: str, A: Tensor, basis: Tensor | None = None) -> State:
    """The state with this A, B = 0 to go with it, and, if given, the coordinates of B."""
    m = len(state[f"{module}.lora_B"]) if basis is None else len(basis)
    placed = state | {f"{module}.lora_A": A.float(), f"{module}.lora_B": torch.zeros(m, len(A))}
    return placed if basis is None else placed | {f"{module}.{BASIS}": basis.float()}


def _candidates(config: RunConfig, state: State, model: LoadedModel, module: str, kept: Tensor, task: int) -> Tensor:
    """Where FedSVD's A comes from: with ``lora.init_a = "weights"`` what the current weight reads most of the free
    inputs, else random.
    """
    n, rank = kept.shape[1], config.lora.rank
    if config.lora.init_a == "weights":
        weight = current_weight(model, state, module)
        free = weight - (weight @ kept.double().mT) @ kept.double()
        return principal_rows(free.mT @ free, min(n, 2 * rank))[0]
    generator = torch.Generator().manual_seed(stream_seed(config.run.seed, "task", str(task), module) % 2**63)
    return torch.randn(min(n, 2 * rank + len(kept)), n, generator=generator, dtype=torch.float64)
