"""What a run starts from on the server: a fresh adapter, or, in a stream, what the task before left."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.lora.state import State
from fedlab.models.adapters import initial_state
from fedlab.session import Session, torch_threads
from strategies.base import Strategy

MEMORY = "memory.safetensors"  # in a task's run directory: what the next one needs to know


def first_state(config: RunConfig, strategy: Strategy, session: Session) -> tuple[State, dict[str, Tensor]]:
    """The state that the run starts from, and what the task before left (nothing for the first, or
    without a stream).
    """
    fresh = initial_state(session.model, config.lora, config.run.seed)
    if config.stage is None:
        with torch_threads(1):
            return strategy.begin_task(fresh, {}, 0), {}
    memory: dict[str, Tensor] = {}
    if config.stage.previous is not None:
        path = Path(config.stage.previous) / MEMORY
        if not path.is_file():
            raise ConfigError(
                f"stage.previous = {config.stage.previous!r} has no {MEMORY}: that task is not finished; resume it"
                " first"
            )
        memory = load_file(str(path))
    with torch_threads(1):  # bases must not depend on the number of cores
        return strategy.begin_task(fresh, memory, config.stage.task), memory
