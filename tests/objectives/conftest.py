"""The toy objective and its evaluator, loaded from their files and registered for one test."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedlab.evaluate import EVALUATORS
from fedlab.objectives import OBJECTIVES

FRUIT, OTHER = ["apple", "pear", "plum", "cherry", "grape"], ["iron", "wave", "tide", "zinc", "rust"]


def _module(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "toy" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """``objective.name = "toy-regression"`` and its evaluator ``toy-errors``."""
    monkeypatch.setitem(OBJECTIVES, "toy-regression", _module("regression").ToyRegression)
    monkeypatch.setitem(EVALUATORS, "toy-errors", _module("errors").EVALUATOR)


@pytest.fixture
def number_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A csv of 300 texts, each with the share of fruit in it less a half."""
    rng, path = np.random.default_rng(7), tmp_path_factory.mktemp("numbers") / "fruit.jsonl"
    lines = []
    for _ in range(300):
        count, fruit = int(rng.integers(3, 9)), rng.random()
        words = [str(rng.choice(FRUIT if rng.random() < fruit else OTHER)) for _ in range(count)]
        share = sum(word in FRUIT for word in words) / count - 0.5
        lines.append(json.dumps({"text": " ".join(words), "topic": round(share, 4)}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def number_toml(toy: None, tiny_toml: str, tiny_data: Path, number_data: Path, tiny_bert: Path, tiny_sentence_encoder):
    """``tiny_toml`` under the toy objective, with DP, on the mean-pooling encoder."""
    text = tiny_toml.replace(str(tiny_data), str(number_data)).replace(str(tiny_bert), str(tiny_sentence_encoder))
    return text.replace("[lora]", '[objective]\nname = "toy-regression"\n[lora]', 1).replace("lr = 0.5", "lr = 0.1")
