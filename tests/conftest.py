"""What the tests share: tiny real models and data sets on disk, made once per session, and a cache directory of their
own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOPICS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "lemon", "ripe", "sweet", "juicy", "peel"],
    "metal": ["iron", "copper", "zinc", "steel", "alloy", "rust", "forge", "molten", "ore", "weld"],
    "ocean": ["wave", "tide", "reef", "salt", "coral", "harbour", "sail", "storm", "deep", "current"],
}
FILLER = ["the", "a", "of", "and", "with", "under", "near", "some", "very", "old", "new", "small", "large", "thing"]


def _sentences(path: Path, seed: int, count: int, topics: list[str], filler: int, sites: int = 0) -> Path:
    """Write short sentences on topics in turn: three of the topic's words and two to ``filler`` others, shuffled."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            topic = topics[i % len(topics)]
            words = [*rng.choice(TOPICS.get(topic, FILLER), 3), *rng.choice(FILLER, int(rng.integers(2, filler + 1)))]
            rng.shuffle(words)
            file.write(
                json.dumps({"text": " ".join(words), "topic": topic} | ({"site": f"site{i % sites}"} if sites else {}))
                + "\n"
            )
    return path


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every test caches below one temporary directory, never in the user's home."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["FEDLAB_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 360 short sentences on three topics."""
    return _sentences(tmp_path_factory.mktemp("data") / "topics.jsonl", 0, 360, list(TOPICS), filler=7, sites=5)


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-level tokenizer over the words of ``tiny_data``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(w for t in TOPICS.values() for w in t)]
    vocabulary = {word: i for i, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return path


def _save(model: object, tokenizer_files: Path, path: Path) -> Path:
    from transformers import AutoTokenizer

    model.save_pretrained(path)  # type: ignore[attr-defined]
    AutoTokenizer.from_pretrained(tokenizer_files).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Path:
    """A two-layer BERT encoder with random weights, saved as a local model directory."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return _save(BertModel(config), tokenizer_files, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: Path) -> Path:
    """A two-layer GPT-2 (Conv1D layers), saved as a local model directory."""
    import torch
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3)
    return _save(GPT2Model(config), tokenizer_files, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tiny_sentence_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """``tiny_bert`` with sentence-transformers' files for mean pooling beside it."""
    import shutil

    path = tmp_path_factory.mktemp("encoder") / "model"
    shutil.copytree(tiny_bert, path)
    (path / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    )
    return path


@pytest.fixture
def learnable_toml(tiny_toml: str, tiny_bert: Path, tiny_sentence_encoder: Path) -> str:
    """``tiny_toml`` without DP, on the mean-pooling encoder, whose random features are worth learning from."""
    head, _, rest = tiny_toml.partition("[privacy]")
    return head.replace(str(tiny_bert), str(tiny_sentence_encoder)) + "[evaluate]" + rest.partition("[evaluate]")[2]


@pytest.fixture
def tiny_toml(tiny_bert: Path, tiny_data: Path) -> str:
    """A whole configuration that runs in seconds: three clients, three rounds, FedSVD, DP with a given σ, local
    backend.
    """
    return f"""
[run]
name = "tiny"
rounds = 3
nodes = 1
seed = 3
backend = "local"
[model]
name = "{tiny_bert}"
[lora]
rank = 4
alpha = 8
target_modules = ["query", "value"]
[data]
source = "files"
path = "{tiny_data}"
text = "text"
label = "topic"
clients = 3
max_length = 16
test_fraction = 0.2
[strategy]
name = "fedsvd"
[train]
steps = 3
batch_size = 16
physical_batch = 8
lr = 0.5
momentum = 0.5
[privacy]
unit = "example"
sigma = 1.0
clip = 1.0
[evaluate]
every = 1
"""


@pytest.fixture(scope="session")
def stream_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 480 short sentences on four topics, the fourth of filler words alone."""
    return _sentences(tmp_path_factory.mktemp("stream") / "topics.jsonl", 1, 480, [*TOPICS, "dry"], filler=5)


@pytest.fixture
def stream_toml(learnable_toml: str, tiny_data: Path, stream_data: Path) -> str:
    """Two tasks of two topics each, without DP, on the mean-pooling encoder."""
    text = learnable_toml.replace(str(tiny_data), str(stream_data)).replace(
        'name = "fedsvd"', 'name = "osft-data"\nenergy = 0.9\nfree = 4'
    )
    return (
        text + '\n[[tasks]]\nname = "wet"\nlabels = ["fruit", "ocean"]\n[[tasks]]\nname = "hard"\nlabels = ["metal",'
        ' "dry"]\n'
    )


@pytest.fixture(scope="module")
def drawn_once() -> Iterator[None]:
    """Figures of reports are drawn once each: they are pure functions, and half a second every time."""
    import fedlab.report.plots as plots
    import fedlab.report.stream as stream

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((plots, "line_chart"), (plots, "bar_chart"), (stream, "heat_map")):
            patch.setattr(module, name, _once(getattr(module, name)))
        yield


def _once(function: Callable[..., str]) -> Callable[..., str]:
    made: dict[str, str] = {}

    def cached(*arguments: Any) -> str:
        key = repr(arguments)
        if key not in made:
            made[key] = function(*arguments)
        return made[key]

    return cached
