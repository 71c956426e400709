"""The inputs of the golden runs: tiny models and texts, the same bytes whenever they are made.

Run as a script (``inputs.py FOLDER``) in a process of its own, so that no golden run inherits its random state.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

TOPICS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "lemon", "ripe", "sweet", "juicy", "peel"],
    "metal": ["iron", "copper", "zinc", "steel", "alloy", "rust", "forge", "molten", "ore", "weld"],
    "ocean": ["wave", "tide", "reef", "salt", "coral", "harbour", "sail", "storm", "deep", "current"],
}
FILLER = ["the", "a", "of", "and", "with", "under", "near", "some", "very", "old", "new", "small", "large", "thing"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SITES = 5  # values of the column "site", for the natural partition


def make_inputs(folder: Path) -> None:
    """Write ``models/{bert,gpt2,encoder,llama}``, ``data/*.jsonl`` and ``public.txt`` below ``folder``."""
    make_texts(folder)
    make_models(folder / "models")


def make_texts(folder: Path) -> None:
    """Write the data sets: three topics (with sites), a test split, sentence pairs, four topics, public texts."""
    data = folder / "data"
    data.mkdir(parents=True)
    write_rows(data / "topics.jsonl", rows(0, 360, list(TOPICS), filler=7))
    write_rows(data / "test.jsonl", rows(2, 60, list(TOPICS), filler=7))
    write_rows(data / "four.jsonl", rows(1, 480, [*TOPICS, "dry"], filler=5))
    firsts, seconds = rows(3, 240, list(TOPICS), filler=4), rows(4, 240, list(TOPICS), filler=4)
    pairs = [one | {"other": two["text"]} for one, two in zip(firsts, seconds, strict=True)]
    write_rows(data / "pairs.jsonl", pairs)
    public = [str(row["text"]) for row in rows(5, 80, list(TOPICS), filler=7)]
    (folder / "public.txt").write_text("\n".join(public) + "\n", encoding="utf-8")


def rows(seed: int, count: int, topics: list[str], filler: int) -> list[dict[str, str]]:
    """Short sentences on topics in turn: three of the topic's words and two to ``filler`` others, shuffled."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        topic = topics[i % len(topics)]
        words = [*rng.choice(TOPICS.get(topic, FILLER), 3), *rng.choice(FILLER, int(rng.integers(2, filler + 1)))]
        rng.shuffle(words)
        found.append({"text": " ".join(words), "topic": topic, "site": f"site{i % SITES}"})
    return found


def write_rows(path: Path, found: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def make_models(folder: Path) -> None:
    """Write a BERT, a GPT-2 (Conv1D layers), a sentence encoder with mean pooling and a Llama, of random weights."""
    import torch
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    save(BertModel(bert), folder / "bert")
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3)
    save(GPT2Model(gpt2), folder / "gpt2")
    make_encoder(folder / "bert", folder / "encoder")
    make_llama(folder / "llama")


def make_encoder(bert: Path, path: Path) -> None:
    """Copy ``bert`` and put sentence-transformers' files for mean pooling beside it."""
    shutil.copytree(bert, path)
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def make_llama(path: Path) -> None:
    """A decoder with an output layer over the words, of weights that signals pass through."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    save(LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **shape, **heads, **ends)), path)


def save(model: Any, path: Path) -> None:
    """Save a model and the tokenizer as a local model directory."""
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def make_tokenizer() -> Any:
    """A word-level tokenizer over the words of the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *FILLER, *(word for topic in TOPICS.values() for word in topic)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


if __name__ == "__main__":
    make_inputs(Path(sys.argv[1]))
