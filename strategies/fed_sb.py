"""Fed-SB (arXiv 2502.15436): ΔW = Uᵀ·R·V with fixed bases; clients train the core R [r, r] alone, and averaging it is
exact.

Under DP its point is size: r² noised numbers per layer and not (m + n)·r. U and V are the leading singular vectors of
the base weight and R starts at 0 (LoRA-XS, arXiv 2405.17604). The published start, from the first step's gradient over
private data (LoRA-SB), would be a release of its own and is not made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedlab.config import RunConfig
from fedlab.continual.subspace import leading_triplets
from fedlab.errors import ConfigError
from fedlab.lora.state import BASIS, State, modules
from strategies.base import Strategy
from strategies.stream import placed


class FedSB(Strategy):
    """R_t+1 = Σ p_k R_k; lora_B holds R, in the coordinates of basis_U."""

    effective: ClassVar[str] = "mean of products, exactly"
    trains: ClassVar[frozenset[str]] = frozenset({"lora_B"})
    static: ClassVar[frozenset[str]] = frozenset({"lora_A", BASIS})
    ranks: ClassVar[str] = ""
    linear: ClassVar[bool] = True

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Layers that can be trained in coordinates, and one task."""
        super().check(config)
        name = config.strategy.name
        if config.train.gradients != "fused":
            raise ConfigError(
                f'strategy.name = "{name}" needs train.gradients = "fused", got "{config.train.gradients}"'
            )
        if config.tasks:
            raise ConfigError(f'strategy.name = "{name}" with [[tasks]]: its bases stay for ever; use osft')

    def begin_task(self, state: State, memory: Mapping[str, Tensor], task: int) -> State:
        """The leading singular vectors of every layer's weight."""
        rank = self.config.lora.rank
        for module in modules(state):
            top = leading_triplets(self.base.pristine(module), rank)
            state = placed(state, module, top.right, top.left)
        return state
