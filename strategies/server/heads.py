"""The heads of a stream's tasks, which are rows of one head: what a task may train of it, and what stays as it was."""

from __future__ import annotations

import torch

from fedlab.config import RunConfig
from fedlab.data import task_data
from fedlab.lora.state import State, part_of
from strategies.base import Strategy


def frozen_layers(config: RunConfig, state: State) -> set[str]:
    """Layers of a head that all tasks share: after the first task they stay, where each task has labels of its own."""
    if config.stage is None or not config.stage.task or config.stream.heads == "shared":
        return set()
    groups = task_data(config)[1].groups
    if groups is None:
        return set()
    return {name for name in state if part_of(name) == "head" and len(state[name]) != len(groups)}


def keep_other_heads(config: RunConfig, before: State, after: State) -> State:
    """``after``, but rows of labels that this task has no example of are as before: neither noise nor a client changes
    them.
    """
    if config.stage is None or config.stream.heads == "shared":
        return after
    outside = torch.from_numpy(
        task_data(config)[1].outside(config.stage.task, config.stream.replay, config.stream.joint)
    )
    result = dict(after)
    for name, value in after.items():
        if part_of(name) == "head" and len(value) == len(outside):
            result[name] = value.clone()
            result[name][outside] = before[name][outside]
    return result


def trained_names(strategy: Strategy, state: State, number: int = 1) -> list[str]:
    """Names of the tensors that clients train in a round: the strategy's, without what the task may not train."""
    frozen = frozen_layers(strategy.config, state)
    return [name for name in strategy.trained_names(state, number) if name not in frozen]


def sent_names(strategy: Strategy, state: State, number: int = 1) -> list[str]:
    """Those of them that they send back."""
    frozen = frozen_layers(strategy.config, state)
    return [name for name in strategy.sent_names(state, number) if name not in frozen]
