"""What the boundary between two tasks costs on a large encoder: bases, complements, Gram matrices; seconds and memory.

    python simulations/benchmarks/boundary.py               # RoBERTa-base's shape, random weights; about five minutes
    on two cores python simulations/benchmarks/boundary.py --small       # seconds; what the test suite runs

All linear layers of the encoder are adapted. Rows: OSFT's leading singular triplets and both complements (``preserve``
5 % by subspace iteration, 50 % by whole decompositions); one client's Gram matrices of ``--texts`` texts; extending the
protected basis by them and making its complement. Peak is the process's resident memory beyond what it had before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import psutil
import torch
from common import header, line, parser, write_json

from fedlab.config.sections import LoraSection
from fedlab.continual.input_grams import input_grams, input_groups
from fedlab.continual.subspace import complement, extend, leading_triplets
from fedlab.data import FederatedData
from fedlab.data.collate import Tokens
from fedlab.data.partition import Shards
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import adapt
from fedlab.objectives import Classification


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and return its rows."""
    options = parser(__doc__)
    options.add_argument("--texts", type=int, default=200)
    options.add_argument("--length", type=int, default=64)
    options.add_argument("--energy", type=float, default=0.9)
    options.add_argument("--small", action="store_true")
    args = options.parse_args(arguments)
    model = roberta(args.small)
    weights = {module: model.pristine(module) for module in sorted(model.scale)}
    data = texts(8 if args.small else args.texts, args.length)
    groups = input_groups(model)
    rows: dict[str, Any] = {}
    print(f"{len(weights)} layers, {len(set(groups.values()))} distinct inputs")
    print(header("what", "seconds", "peak MB"), flush=True)

    def osft(preserve: float) -> None:
        for weight in weights.values():
            found = leading_triplets(weight, int(preserve * min(weight.shape)))
            complement(found.left.float())
            complement(found.right.float())

    def grow(grams: dict[str, torch.Tensor]) -> None:
        for gram in grams.values():
            n = len(gram)
            complement(extend(torch.zeros(0, n), gram, args.energy, n))

    grams: dict[str, torch.Tensor] = {}
    for preserve in (0.05, 0.5):
        rows[f"osft, preserve = {preserve:g}: triplets and complements"] = cost(lambda p=preserve: osft(p))  # type: ignore[misc]
        show(rows)
    name = f"Gram matrices of {len(data.train('client-0'))} texts of {args.length} tokens, forward passes included"
    rows[name] = cost(lambda: grams.update(input_grams(model, data, data.train("client-0"), groups, 1.0, 16)))
    show(rows)
    rows[f"protected basis (energy {args.energy:g}) and complement"] = cost(lambda: grow(grams))
    show(rows)
    write_json(args.json, rows)
    return rows


def roberta(small: bool) -> LoadedModel:
    """The model with an adapter on every linear layer of its encoder."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, num_labels=4, **(tiny if small else {}))
    lora = LoraSection(rank=8, alpha=8, target_modules="all-linear")
    base, objective = RobertaForSequenceClassification(config), Classification(("a", "b", "c", "d"))
    return adapt(base, ["classifier"], cast(Any, Tokenizer()), lora, "roberta", torch.device("cpu"), objective)


class Tokenizer:
    """Gives every text as many tokens as are allowed."""

    pad_token_id = 1

    def __call__(self, texts: list[str], pairs: None, max_length: int, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[4] * max_length for _ in texts]}


def texts(count: int, length: int) -> FederatedData:
    """Random texts of one client."""
    ids = np.random.default_rng(0).integers(4, 50_000, count * length).astype(np.int32)
    tokens = Tokens(ids, np.arange(count + 1, dtype=np.int64) * length, np.zeros(count, dtype=np.int64))
    everything = np.arange(count)
    return FederatedData(tokens, Shards({"client-0": everything}, {"client-0": everything[:0]}, everything[:0]))


def cost(action: Callable[[], object]) -> dict[str, float]:
    """Seconds, and the most memory beyond what there was."""
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = [before]

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    action()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "megabytes": (peak[0] - before) / 1e6}


def show(rows: dict[str, Any]) -> None:
    """The newest row."""
    name, figures = list(rows.items())[-1]
    print(line(name, f"{figures['seconds']:.2f}", f"{figures['megabytes']:.0f}"), flush=True)


if __name__ == "__main__":
    main()
