"""What is learnt: one objective per file, registered here. ``objective.name`` of a configuration chooses one."""

from __future__ import annotations

from fedlab.errors import ConfigError
from fedlab.objectives.base import Objective
from fedlab.objectives.classification import Classification

OBJECTIVES: dict[str, type[Objective]] = {
    "classification": Classification,
}


def objective_class(name: str) -> type[Objective]:
    """The objective that ``objective.name`` names. Raises ConfigError for an unknown one."""
    if name not in OBJECTIVES:
        raise ConfigError(f'objective.name = "{name}" is unknown; known: {", ".join(sorted(OBJECTIVES))}')
    return OBJECTIVES[name]
