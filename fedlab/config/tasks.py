"""The sections of a configuration that make it a stream: tasks that a federation meets one after another.

``fedlab simulate`` runs a configuration with ``[[tasks]]`` as a sequence of runs, one per task, each in a directory of
its own; ``[stage]`` is written into those and says which of the tasks a run is.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fedlab.config.base import Section
from fedlab.identifiers import PATTERN


class Gram(Section):
    """``strategy.gram``: the release at a task's end that says which inputs it used (``fedlab.continual.sketch``)."""

    sigma: float = Field(default=2.0, gt=0, description="noise multiplier of the release under example-level DP")
    clip: float = Field(default=1.0, gt=0, description="joint Frobenius norm of one text's Gram matrices")
    clear: bool = Field(
        default=False, description="without DP: let the server see each client's sum, which may reveal texts"
    )
    min_clients: int = Field(
        default=3, gt=1, description="without DP: fewest clients whose sums are added before anybody sees them"
    )


class TaskSection(Section):
    """[[tasks]]: one task of the stream."""

    name: str = Field(pattern=PATTERN, description="of the task, and in its run's directory")
    labels: tuple[str, ...] = Field(
        default=(),
        description='labels whose texts it has; "noun.*" stands for several; default: all labels of its data',
    )
    rounds: int | None = Field(default=None, gt=0, description="federated rounds of this task; default: run.rounds")
    data: dict[str, Any] = Field(default={}, description="keys of [data] that differ for this task")


class StreamSection(Section):
    """[stream]: what the tasks have to do with each other."""

    heads: Literal["own", "shared"] = Field(
        default="own",
        description=(
            "own: a text is classified among its own task's labels (task-incremental); shared: among all labels"
        ),
    )
    replay: float = Field(
        default=0.0, ge=0, le=1, description="share of every earlier task's examples that is trained on again"
    )
    penalty: float = Field(
        default=0.5, ge=0, description="o-lora: weight λ of the loss's λ·Σ|A·A_iᵀ| over earlier tasks i"
    )
    joint: bool = Field(
        default=False, description="all tasks at once, for as many rounds as they have together: the upper bound"
    )


class StageSection(Section):
    """[stage]: which run of a stream this is; written by the stream, not by hand."""

    task: int = Field(ge=0, description="position in tasks, counted from 0")
    previous: str | None = Field(
        default=None, description="directory of the run before; it holds what this one starts from"
    )
