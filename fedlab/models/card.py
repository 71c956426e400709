"""What lies beside a saved adapter for whoever loads it: the labels' names, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fedlab.config import RunConfig
from fedlab.models.encoder import SentenceClassifier
from fedlab.models.loaded import LoadedModel

LABELS = "labels.json"  # beside the adapter: what from_pretrained has to be told of the base
LOAD = """import json
from peft import {auto}

told = json.load(open("adapter/labels.json"))  # {told}
{keys}model = {auto}.from_pretrained("adapter", **told)"""
KEYS = 'told["id2label"] = {int(i): name for i, name in told["id2label"].items()}  # keys of JSON are strings\n'
# such a base has pooling of its own, which transformers does not know
LOAD_ENCODER = """from fedlab.models.plain import load_run

model = load_run(".")  # the directory that holds run.toml and adapter/"""


def arguments(loaded: LoadedModel) -> dict[str, Any]:
    """What ``from_pretrained`` has to be told of the base: the head's outputs with their names if they have any, what
    they are, padding that it does not know, and in how many bits it was.
    """
    names = loaded.objective.labels
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    padding = {"pad_token_id": loaded.tokenizer.pad_token_id}
    unnamed = {} if names or loaded.objective.head_width is None else {"num_labels": loaded.objective.head_width}
    problem = {} if loaded.objective.problem is None else {"problem_type": loaded.objective.problem}
    kept: Any = getattr(loaded.module.config, "quantization_config", None)
    quantised = {} if kept is None else {"quantization_config": kept.to_dict()}
    return (labels if names else unnamed) | problem | (padding if loaded.told_padding else {}) | quantised


def model_card(loaded: LoadedModel) -> str:
    """What the adapter is, its labels, and how to load it, in Markdown."""
    config: Any = loaded.module.peft_config["default"]
    base, names = json.dumps(config.base_model_name_or_path), loaded.objective.labels
    auto = f"AutoPeft{loaded.objective.auto_class.removeprefix('Auto')}"
    encoder = isinstance(loaded.module.get_base_model(), SentenceClassifier)
    rows = [f"- {i}: {json.dumps(name, ensure_ascii=False)}" for i, name in enumerate(names)]
    parts = [
        f"---\nbase_model: {base}\nlibrary_name: peft\ntags: [lora, fedlab]\n---\n# LoRA adapter of {base}",
        *(["Labels, in the order of the outputs (`labels.json`):", "\n".join(rows)] if names else []),
        f"```python\n{LOAD_ENCODER if encoder else _loading(auto, bool(names))}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _loading(auto: str, named: bool) -> str:
    told = "names of the outputs, and so the size of the head" if named else "what the base is loaded with"
    return LOAD.format(auto=auto, told=told, keys=KEYS if named else "")


def merged_card(config: RunConfig, result: Mapping[str, Any]) -> str:
    """What a merged model is, what it was scored, and what it cost in privacy, in Markdown."""
    base = json.dumps(config.model.name)
    scores = [f"- {name}: {value:.4f}" for name, value in (result.get("scores") or {}).items() if value is not None]
    privacy = (
        f"Trained under differential privacy with ε = {result['epsilon']:.4g}; `PRIVACY.md` says for which δ, what of"
        " whom that protects, and against whom."
        if isinstance(result.get("epsilon"), int | float)
        else "Trained without differential privacy."
    )
    parts = [
        f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [fedlab]\n---\n# {base}, fine-tuned federated",
        f"A LoRA adapter of rank {config.lora.rank} ({config.strategy.name}, {config.run.rounds} rounds,"
        f" objective {config.objective.name}), merged into its base by fedlab.",
        privacy,
        *(["Scores on held-out examples:", "\n".join(scores)] if scores else []),
    ]
    return "\n\n".join(parts) + "\n"
