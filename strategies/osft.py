"""OSFT (arXiv 2504.07097): a task trains only in what the leading singular directions of the current weight leave.

ΔW = Uᵀ·C·V with U and V orthonormal bases of the complements of the ``preserve`` leading left and right singular
vectors. Looks at weights alone, and with ``importance`` at public texts.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedlab.config import RunConfig
from fedlab.continual.importance import layer_importance, preserved_ranks
from fedlab.continual.subspace import complement, leading_triplets
from fedlab.errors import ConfigError
from fedlab.lora.state import State, modules
from fedlab.models.activations import public_batches
from fedlab.models.loaded import LoadedModel
from strategies.options import MeanOptions
from strategies.stream import FixedBases, Memory, carried, current_weight, placed

LOWEST = 0.1  # share that is preserved of a layer of no importance


class OSFTOptions(MeanOptions):
    """[strategy] keys of OSFT."""

    preserve: float = Field(
        default=0.5, ge=0, lt=1, description="share of every layer's singular directions that a task may not touch"
    )
    importance: bool = Field(
        default=False, description="less of it where lora.public shows that a layer changes its input much"
    )


class OSFT(FixedBases):
    """ΔW = Uᵀ·C·V, C trained."""

    Options: ClassVar[type[OSFTOptions]] = OSFTOptions
    options: OSFTOptions

    @classmethod
    def reads_public_texts(cls, config: RunConfig) -> bool:
        """For the importance of layers."""
        return cls.Options(**config.strategy.options).importance

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Importance needs texts to look at."""
        super().check(config)
        if cls.reads_public_texts(config) and config.lora.public is None:
            raise ConfigError("strategy.importance = true needs lora.public, a file of public texts; or remove it")

    def begin_task(self, state: State, memory: Memory, task: int) -> State:
        """Bases of what the current weight's leading directions leave."""
        state, preserve = carried(state, memory), self.options.preserve
        weights = {module: current_weight(self.base, state, module) for module in modules(state)}
        relative = self._importance(state) if self.options.importance else None
        shapes = {module: (weight.shape[0], weight.shape[1]) for module, weight in weights.items()}
        kept = preserved_ranks(shapes, relative, min(LOWEST, preserve), preserve)
        for module, weight in weights.items():
            top = leading_triplets(weight, kept[module])
            state = placed(state, module, complement(top.right.float()), complement(top.left.float()))
        return state

    def _importance(self, state: State) -> dict[str, float]:
        """module → how much its layer matters on the public texts; leaves the model loaded with ``state``."""
        if not isinstance(self.base, LoadedModel):
            raise ValueError("strategy.importance runs public texts through the base: it must be a loaded model")
        self.base.load(state)
        return layer_importance(self.base, public_batches(self.base, self.config.lora))
