"""What one process holds for a run: its configuration, its one model, its data.

Opened once, then shared by every message.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch

from fedlab.config import RunConfig
from fedlab.data import FederatedData, objective_of, open_data
from fedlab.data.collate import Tokens
from fedlab.errors import ConfigError
from fedlab.lora.state import BASIS, State, part_of
from fedlab.models.hidden_states import cache_hidden_states
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import build
from fedlab.objectives.language import LanguageModel
from fedlab.privacy.plan import DPPlan, plan_of


@dataclass(frozen=True)
class Session:
    """A run as one process sees it."""

    config: RunConfig
    model: LoadedModel
    data: FederatedData
    basis: State = field(default_factory=dict)  # what stays as it is during this task of a stream, beside the base

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """State name → shape of every tensor that a strategy may train."""
        rank = self.config.lora.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in self.model.parameters.items():
            module, _, part = name.rpartition(".")
            rows = len(self.basis[f"{module}.lora_A"]) if f"{module}.lora_A" in self.basis else rank
            if part == "lora_A":
                shapes[name] = (rows, parameter.shape[1])
            elif part == "lora_B":
                left = self.basis.get(f"{module}.{BASIS}")
                shapes[name] = (parameter.shape[0] if left is None else len(left), rows)
            else:
                shapes[name] = tuple(parameter.shape)
        return shapes

    def scope(self, parts: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Of these parts, ``shapes``: what a privacy plan covers that is signed for them, whatever a round trains of
        it; server and clients come to the same.
        """
        return {name: shape for name, shape in self.shapes.items() if part_of(name) in parts}

    def plan(self, client: str) -> DPPlan | None:
        """The client's privacy plan, made from its own size; None when it adds no noise itself."""
        if self.config.privacy.unit != "example":
            return None
        tasks, stream = self.data.tasks, self.config.stream
        if tasks is None or stream.joint:
            return plan_of(self.config, self.data.size(client), (self.data.size(client),))
        sizes = [tasks.size(client, task, stream.replay) for task in range(len(tasks.shards))]
        return plan_of(self.config, self.data.size(client), sizes)


@lru_cache(maxsize=1)
def open_session(config_toml: str) -> Session:
    """The process's session for this resolved configuration; the base model is loaded at the first call only."""
    config = RunConfig.parse(config_toml)
    model = build(config, objective_of(config))
    data = open_data(config, model.tokenizer, model.objective)
    check_vocabulary(model, data.tokens, config.model.name)
    if config.run.cache_hidden_states:
        with torch_threads(config.run.threads):
            data = cache_hidden_states(model, data)
    return Session(config, model, data)


def check_vocabulary(model: LoadedModel, tokens: Tokens, name: str) -> None:
    """Raise ConfigError where the tokenizer writes a token that the model has no row for: one that was added to it
    without resizing the model.
    """
    try:
        rows = len(cast(Any, model.module).get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return  # a model that keeps them elsewhere is tried out before round 1
    written = [int(tokens.ids.max(initial=0)), cast(int, model.tokenizer.pad_token_id)]
    if isinstance(model.objective, LanguageModel) and tokens.labels is not None:
        written.append(int(tokens.labels.max(initial=0)))
    if max(written) >= rows:
        raise ConfigError(
            f"model.name = {name!r}: its tokenizer writes token {max(written)}, but the model has {rows} of them (0 to"
            f" {rows - 1}); give it the tokenizer that it was made with, or resize_token_embeddings and save both"
        )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with ``count`` torch threads. The count decides how sums are split, so it is part of what fixes the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
