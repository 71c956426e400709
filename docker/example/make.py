"""Makes what the example needs: keys, records of two hospitals and public ones, and a tiny model. ``make.py FOLDER``

``make.sh`` runs it as root in a container of the server's image: the files go to the uids as which the images run. In
earnest every hospital makes its own key on its own machine, and only ``NAME.pub`` leaves it.
"""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

TRAINER, TRANSPORT = 10001, 10002  # uids of the images
HOSPITALS = ("north", "south")
TOPICS = {
    "fruit": ["apple", "pear", "plum", "cherry", "grape", "lemon", "ripe", "sweet", "juicy", "peel"],
    "metal": ["iron", "copper", "zinc", "steel", "alloy", "rust", "forge", "molten", "ore", "weld"],
    "ocean": ["wave", "tide", "reef", "salt", "coral", "harbour", "sail", "storm", "deep", "current"],
}
FILLER = ["the", "a", "of", "and", "with", "under", "near", "some", "very", "old", "new", "small", "large", "thing"]


def records(path: Path, seed: str, count: int) -> None:
    """Short sentences on three topics; the same seed gives the same file."""
    draw = random.Random(seed)
    path.parent.mkdir(parents=True, mode=0o700)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("text", "topic"))
        for position in range(count):
            topic = list(TOPICS)[position % len(TOPICS)]
            words = draw.sample(TOPICS[topic], 3) + draw.sample(FILLER, draw.randint(2, 7))
            draw.shuffle(words)
            table.writerow((" ".join(words), topic))


def model(path: Path) -> None:
    """A BERT of two layers with random weights, and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(word for topic in TOPICS.values() for word in topic)]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **shape)).save_pretrained(path)


def keys(folder: Path) -> None:
    """The coordinator's keys, and one pair for each hospital, whose public half is let in."""

    def fedlab(*words: object) -> None:
        subprocess.run(["fedlab", "keys", *map(str, words)], check=True)

    fedlab("init", folder / "keys", "--host", "server")
    for name in HOSPITALS:
        fedlab("node", name, "--out", folder / name)
        fedlab("add", folder / "keys", folder / name / f"{name}.pub")


def give(folder: Path, uid: int) -> None:
    """All of a folder to a user."""
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, uid, uid, follow_symlinks=False)


def main(folder: Path) -> None:
    """All of it; who may give files away gives them to those who read them."""
    keys(folder)
    for name in (*HOSPITALS, "public"):
        records(folder / "data" / name / "records.csv", name, 240)
    model(folder / "model")
    if os.geteuid() == 0:
        give(folder, TRAINER)
        for name in HOSPITALS:
            give(folder / name, TRANSPORT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
