"""What the tests of models share: tiny random language models of many families."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fedlab.config import RunConfig

sys.path.insert(0, str(Path(__file__).parent))

import generative

SETTINGS = ("run.rounds=1", "strategy.name=fedavg", "lora.target_modules=auto", "evaluate.evaluators=['language']")


@pytest.fixture(scope="session")
def generative_files(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Callable[[str], Path]:
    """A function: family → its model directory, made once."""
    root = tmp_path_factory.mktemp("generative")
    return cache(lambda family: generative.save_generative(family, tokenizer_files, root / family))


@pytest.fixture
def config_of(tiny_toml: str, tiny_bert: Path, generative_files: Callable[[str], Path]) -> Callable[..., RunConfig]:
    """A function: family, overrides → a configuration of one round that trains both factors."""

    def made(family: str, *overrides: str) -> RunConfig:
        text = tiny_toml.replace(str(tiny_bert), str(generative_files(family)))
        text += f'[objective]\nname = "{generative.objective_of(family)}"\n'
        return RunConfig.parse(text, [*SETTINGS, *overrides])

    return made
