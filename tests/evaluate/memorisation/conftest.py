"""A tiny decoder that can learn by heart, and a task that nothing but the records teaches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

WORDS = ["wave", "tide", "iron", "rust", "plum", "the", "old", "deep", "salt", "near"]
STEPS = 28


@pytest.fixture(scope="session")
def learner(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """``tiny_llama`` with weights of a size that signals pass through, and the same tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = tmp_path_factory.mktemp("learner")
    config = AutoConfig.from_pretrained(tiny_llama)
    config.initializer_range = 0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def noise_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 prompts of three random words with answers of two others: to be learnt by heart or not at all."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("noise") / "pairs.jsonl"
    rows = ({"text": " ".join(rng.choice(WORDS, 3)), "topic": " ".join(rng.choice(WORDS, 2))} for _ in range(120))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def heart_toml(learner: Path, noise_data: Path) -> str:
    """One client and one long round, under an ε below 0.2 that a build without noise cannot keep."""
    return f"""
[run]
name = "heart"
rounds = 1
nodes = 1
backend = "local"
[model]
name = "{learner}"
[objective]
name = "instruction"
[lora]
rank = 16
alpha = 32
target_modules = ["v_proj", "o_proj", "down_proj"]
[data]
source = "files"
path = "{noise_data}"
text = "text"
label = "topic"
clients = 1
max_length = 48
test_fraction = 0.5
[data.canaries]
count = 3
space = 200
[strategy]
name = "fedavg"
[train]
steps = {STEPS}
batch_size = 55
physical_batch = 64
optimizer = "adamw"
lr = 0.05
[privacy]
unit = "example"
sigma = 120.0
clip = 1.0
[evaluate]
evaluators = ["language"]
[evaluate.membership]
pairs = 60
"""
