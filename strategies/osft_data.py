"""OSFT on inputs: a task trains in all input directions that no earlier task used.

ΔW = C·V with V a basis of the complement of the protected inputs: as plastic as can be, and exact on protected inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedlab.config import RunConfig
from fedlab.continual.subspace import complement
from fedlab.lora.state import State, modules
from strategies.stream import (
    FixedBases,
    InputsOptions,
    Memory,
    carried,
    check_release,
    grown,
    merged,
    placed,
    protected,
)


class OSFTData(FixedBases):
    """ΔW = C·V, C trained."""

    reads_inputs: ClassVar[bool] = True
    Options: ClassVar[type[InputsOptions]] = InputsOptions
    options: InputsOptions

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """There must be a way to learn which inputs a task used."""
        super().check(config)
        check_release(config, cls.Options(**config.strategy.options).gram)

    def begin_task(self, state: State, memory: Memory, task: int) -> State:
        """A basis of what is not protected, for every module."""
        state = carried(state, memory)
        for module in modules(state):
            state = placed(state, module, complement(protected(memory, state, module)))
        return state

    def end_task(self, state: State, memory: Memory, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the task taught, and the inputs that it used beside those of earlier ones."""
        return merged(state) | grown(self.config, self.options, state, memory, grams)
