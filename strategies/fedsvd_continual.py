"""FedSVD in a stream: A is orthonormal inside the complement of the protected inputs.

B is trained, and refactorising stays in A's span, so that what earlier tasks read stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.continual.subspace import CapacityExhausted
from fedlab.errors import ConfigError
from fedlab.lora.state import RESIDUAL, State, modules
from fedlab.lora.subspace import open_rows
from fedlab.lora.svd import principal_rows
from fedlab.seeds import torch_stream
from strategies.fedsvd import FedSVD, FedSVDOptions
from strategies.stream import (
    InputsOptions,
    Memory,
    carried,
    check_release,
    check_stream,
    current_weight,
    grown,
    merged,
    placed,
    protected,
)


class FedSVDContinualOptions(FedSVDOptions, InputsOptions):
    """[strategy] keys of FedSVD in the complement of the protected inputs."""


class FedSVDContinual(FedSVD):
    """FedSVD within a task, from an A that no protected input meets."""

    reads_inputs: ClassVar[bool] = True
    static: ClassVar[frozenset[str]] = frozenset(RESIDUAL)
    ranks: ClassVar[str] = ""
    Options: ClassVar[type[FedSVDContinualOptions]] = FedSVDContinualOptions
    options: FedSVDContinualOptions

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """New directions would leave the complement."""
        super().check(config)
        check_stream(config)
        options = cls.Options(**config.strategy.options)
        check_release(config, options.gram)
        if options.refresh is not None:
            raise ConfigError(
                "strategy.refresh with fedsvd-continual: new directions would leave the complement; remove it"
            )

    def begin_task(self, state: State, memory: Memory, task: int) -> State:
        """An A of ``lora.rank`` orthonormal rows in the complement. Raises CapacityExhausted where it is too small."""
        state, rank = carried(state, memory), self.config.lora.rank
        for module in modules(state):
            kept, n = protected(memory, state, module), state[f"{module}.lora_A"].shape[1]
            if rank > n - len(kept):
                raise CapacityExhausted(
                    f"{module}: {len(kept)} of {n} input directions are protected, lora.rank = {rank} more"
                    " are needed; lower the rank or strategy.energy, or end the stream here"
                )
            state = placed(state, module, open_rows(kept, self._first_rows(state, module, kept, task), rank))
        return state

    def end_task(self, state: State, memory: Memory, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the task taught, and the inputs that it used beside those of earlier ones."""
        return merged(state) | grown(self.config, self.options, state, memory, grams)

    def _first_rows(self, state: State, module: str, kept: Tensor, task: int) -> Tensor:
        """Rows to choose A from: with ``lora.init_a = "weights"`` what the current weight reads most of the free
        inputs, else random.
        """
        n, rank = kept.shape[1], self.config.lora.rank
        if self.config.lora.init_a == "weights":
            weight = current_weight(self.base, state, module)
            free = weight - (weight @ kept.double().mT) @ kept.double()
            return principal_rows(free.mT @ free, min(n, 2 * rank))[0]
        generator = torch_stream(self.config.run.seed, "task", str(task), module)
        return torch.randn(min(n, 2 * rank + len(kept)), n, generator=generator, dtype=torch.float64)
