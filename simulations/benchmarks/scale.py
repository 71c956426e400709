"""What many clients cost: 10,000 registered, 1,000 per round, on a tiny model whose training costs almost nothing.

    python simulations/benchmarks/scale.py                         # 10,000 clients, 1,000 per round, with and without
    DP python simulations/benchmarks/scale.py --vary clients          # or rank, modules, length: how a round's cost
    grows python simulations/benchmarks/scale.py --small                 # seconds; what the test suite runs

Model (a random two-layer BERT), tokenizer and texts are made in a temporary directory. Per run: seconds until the first
round (reading, tokenising, dealing, and 10,000 clients that declare themselves), seconds per round, of them training
and evaluation, what remains per client (*overhead*), the peak memory of all processes together (proportional set size:
shared pages are counted once), and how long
``fedlab audit`` takes, which must find nothing wrong.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import header, line, metrics, parser, write_json

import fedlab
from fedlab.config import RunConfig
from fedlab.privacy.audit.run import audit_run

WORDS = [f"w{i}" for i in range(200)]
AXES: dict[str, tuple[str, list[Any]]] = {
    "clients": ("run.fraction", [0.01, 0.03, 0.1]),
    "rank": ("lora.rank", [1, 4, 16]),
    "modules": ("lora.target_modules", [["query"], ["query", "value"], "all-linear"]),
    "length": ("data.max_length", [8, 16, 32]),
}

COLUMNS = {  # of the table → of a row
    "set-up s": "setup",
    "round s": "round",
    "training s": "training",
    "evaluation s": "evaluation",
    "overhead per client ms": "overhead_ms",
    "peak GB": "gigabytes",
    "audit s": "audit",
}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print a table and return its rows."""
    options = parser(__doc__)
    options.add_argument("--clients", type=int, default=10_000)
    options.add_argument("--fraction", type=float, default=0.1)
    options.add_argument("--examples", type=int, default=20, help="per client")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--vary", choices=list(AXES))
    options.add_argument("--privacy", nargs="+", default=["DP", "no DP"], choices=["DP", "no DP"])
    options.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--small", action="store_true", help="40 clients, 10 per round, in this process")
    args = options.parse_args(arguments)
    if args.small:
        args.clients, args.fraction, args.rounds = 40, 0.25, 2
        args.overrides = ["run.backend=local", "run.nodes=1", *args.overrides]
    rows: list[dict[str, Any]] = []
    print(header("privacy", "setting", *COLUMNS), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        toml = make(Path(folder), args)
        key, values = AXES[args.vary] if args.vary else ("run.rounds", [args.rounds])
        for privacy in args.privacy:
            for value in values:
                setting = f"{key}={json.dumps(value)}"
                off = ['privacy={unit="none"}'] if privacy == "no DP" else []
                config = RunConfig.parse(toml, [*off, setting, *args.overrides])
                rows.append(
                    {"privacy": privacy, "setting": setting, **measure(config, Path(folder) / f"run-{len(rows)}")}
                )
                print(line(privacy, setting, *(f"{rows[-1][k]:.2f}" for k in COLUMNS.values())), flush=True)
    write_json(args.json, {"clients": args.clients, "fraction": args.fraction, "rows": rows})
    return rows


def make(folder: Path, args: argparse.Namespace) -> str:
    """Write model, tokenizer and texts; returns the configuration."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **tokens).save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    BertModel(BertConfig(vocab_size=len(vocabulary), **shape)).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    with (folder / "texts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(args.clients * args.examples):
            writer.writerow(
                [" ".join(rng.choice(WORDS[i % 4 :: 4], 30 if args.vary == "length" else 6)), f"label{i % 4}"]
            )
    return f"""
[run]
rounds = {args.rounds}
nodes = 2
fraction = {args.fraction}
[model]
name = "{folder / "model"}"
[lora]
rank = 4
alpha = 4
target_modules = ["query", "value"]
[data]
source = "files"
path = "{folder / "texts.csv"}"
text = "text"
label = "label"
clients = {args.clients}
min_client_size = 2
max_length = 16
test_fraction = 0.1
[strategy]
name = "ffa"
[train]
steps = 1
batch_size = 2
lr = 0.1
[privacy]
unit = "example"
sigma = 1.0
clip = 1.0
[evaluate]
every = 1000
clients = "never"
"""


def measure(config: RunConfig, out: Path) -> dict[str, float]:
    """One run: medians over its rounds but the first, in which processes load what they need."""
    memory = Memory()
    memory.start()
    started = time.time()
    run = fedlab.simulate(config, out, quiet=True)
    memory.done.set()
    memory.join()
    rounds = metrics(run.path, "train")
    first = rounds[0]["time"] - rounds[0]["seconds"]
    later = rounds[1:] or rounds
    found = {
        "setup": first - started,
        "round": statistics.median(line["seconds"] for line in later),
        "training": statistics.median(line["train_seconds"] for line in later),
        "evaluation": statistics.median(line["evaluate_seconds"] for line in later),
        "overhead_ms": 1000 * statistics.median(line["overhead_seconds"] / len(line["clients"]) for line in later),
        "gigabytes": memory.peak / 1e9,
        "clients_per_round": len(rounds[-1]["clients"]),
        "seconds": run.result["seconds"],
        "audit": math.nan,
    }
    if config.privacy.unit != "none":
        started = time.time()
        if wrong := audit_run(run.path).findings:
            raise RuntimeError(f"the audit of {run.path} found {wrong[:3]}")
        found["audit"] = time.time() - started
    return found


class Memory(threading.Thread):
    """Watches the memory of this process and all below it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self) -> None:
        """At once, and twice a second until ``done``."""
        while True:
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, AttributeError):
                    continue
            self.peak = max(self.peak, total)
            if self.done.wait(0.5):
                return


if __name__ == "__main__":
    main()
