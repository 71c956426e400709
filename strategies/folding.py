"""What strategies that change the base share: a low-rank residual per module, kept as factors and sent as such."""

from __future__ import annotations

from torch import Tensor

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.exact import add_low_rank
from fedlab.lora.state import State, residual_of, with_residual


def require_float32(config: RunConfig) -> None:
    """Raises ConfigError where the base is kept in 16 bits or fewer: it would round a residual away."""
    if config.model.quantize != "none":
        raise ConfigError(
            f'strategy.name = "{config.strategy.name}" adds a residual to the base, whose weights model.quantize ='
            f' "{config.model.quantize}" keeps in few bits; set model.quantize = "none"'
        )
    if config.run.dtype != "float32":
        raise ConfigError(
            f'strategy.name = "{config.strategy.name}" adds a residual to the base, which run.dtype ='
            f' "{config.run.dtype}" would round away; use "float32"'
        )


def fold(state: State, module: str, factors: tuple[Tensor, Tensor], rank: int | None = None) -> State:
    """The state with B·A of ``factors`` added to the module's residual; exact, unless ``rank`` caps it (best
    approximation).
    """
    before = residual_of(state, module)
    zero = factors[0][:, :0], factors[1][:0]
    B, A = add_low_rank(before if before is not None else zero, factors, rank)
    return with_residual(state, module, B.float(), A.float())
