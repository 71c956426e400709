"""What is learnt: one objective per file, registered here. ``objective.name`` of a configuration chooses one."""

from __future__ import annotations

from fedlab.config import RunConfig
from fedlab.errors import ConfigError
from fedlab.objectives.base import Objective
from fedlab.objectives.causal_lm import CausalLM
from fedlab.objectives.classification import Classification
from fedlab.objectives.instruction import Instruction
from fedlab.objectives.multi_label import MultiLabel
from fedlab.objectives.regression import Regression
from fedlab.objectives.seq2seq import Seq2Seq

OBJECTIVES: dict[str, type[Objective]] = {
    "causal-lm": CausalLM,
    "classification": Classification,
    "instruction": Instruction,
    "multi-label": MultiLabel,
    "regression": Regression,
    "seq2seq": Seq2Seq,
}


def objective_class(name: str) -> type[Objective]:
    """The objective that ``objective.name`` names. Raises ConfigError for an unknown one."""
    if name not in OBJECTIVES:
        raise ConfigError(f'objective.name = "{name}" is unknown; known: {", ".join(sorted(OBJECTIVES))}')
    return OBJECTIVES[name]


def check_head(config: RunConfig) -> None:
    """Raise ConfigError for the first key about a head where the objective trains none."""
    if objective_class(config.objective.name).has_head:
        return
    train, stream = config.train, config.stream
    for key, given in (
        (f'train.head = "{train.head}"', train.head != "train"),
        (f"train.head_lr = {train.head_lr}", train.head_lr is not None),
        (f'stream.heads = "{stream.heads}"', stream.heads != "own"),
    ):
        if given:
            raise ConfigError(f'{key}, but objective.name = "{config.objective.name}" trains no head; remove it')
