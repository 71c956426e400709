"""O-LoRA (arXiv 2310.14152): a new adapter per task, kept off the earlier ones' A by ``stream.penalty``. Soft: not
exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.lora.state import PAST, RESIDUAL, State, modules
from fedlab.models.adapters import draw_a
from strategies.base import Strategy
from strategies.stream import Memory, carried, check_stream, merged, placed


class OLoRA(Strategy):
    """A_t+1 = Σ p_k A_k, B_t+1 = Σ p_k B_k, from a new A in every task."""

    linear: ClassVar[bool] = True
    static: ClassVar[frozenset[str]] = frozenset({*RESIDUAL, PAST})
    ranks: ClassVar[str] = ""
    own_steps: ClassVar[str] = "its penalty is a part of each client's own steps, and here clients make none"

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """A stream, and layers that know the penalty."""
        super().check(config)
        check_stream(config)

    def begin_task(self, state: State, memory: Memory, task: int) -> State:
        """A newly drawn A, beside the earlier ones."""
        state = carried(state, memory) | {name: value for name, value in memory.items() if name.endswith(f".{PAST}")}
        for module in modules(state):
            shape = tuple(state[f"{module}.lora_A"].shape)
            state = placed(state, module, draw_a("kaiming", shape, self.config.run.seed, "task", task, module))
        return state

    def end_task(self, state: State, memory: Memory, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the task taught, and its A after those of earlier tasks."""
        past = {
            f"{m}.{PAST}": [v for v in (state.get(f"{m}.{PAST}"), state[f"{m}.lora_A"]) if v is not None]
            for m in modules(state)
        }
        return merged(state) | {name: torch.cat(values) for name, values in past.items()}
