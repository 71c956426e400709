"""Full fine-tuning of the adapted layers, nothing protected: a baseline for streams, which forgets."""

from __future__ import annotations

import torch

from fedlab.lora.state import State, modules
from strategies.stream import FixedBases, Memory, carried, placed


class FullFineTuning(FixedBases):
    """ΔW = C, a whole matrix."""

    def begin_task(self, state: State, memory: Memory, task: int) -> State:
        """A = I, so that B is the change itself."""
        state = carried(state, memory)
        for module in modules(state):
            state = placed(state, module, torch.eye(state[f"{module}.lora_A"].shape[1]))
        return state
