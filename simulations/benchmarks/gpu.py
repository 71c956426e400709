"""What a GPU does with a shared pass: examples per second, share of its bfloat16 matrix rate, what DP costs, memory.

    python simulations/benchmarks/gpu.py            # RoBERTa-large and a 1B-class Llama, random weights: minutes
    python simulations/benchmarks/gpu.py --small    # tiny models, also on a CPU; what the test suite runs

No Ray, no files, no downloads. A bfloat16 base (float32 on a CPU that does not multiply bfloat16 fast), float32
adapters, norms and sums; LoRA B of query and value and the head, texts of ``--length`` tokens. Per batch size (rows of
a pass) the ways:

- bare: stock peft and autograd, no DP, no clients: the floor;
- private: one client's DP-SGD steps, ``train_cohort`` as it is, noise and all;
- cohort: the same rows from ``--clients`` clients in one pass;
- apart: those clients one after the other, which is what a shared pass saves;
- hooks: one client's DP-SGD steps by per-example hooks (``train.gradients = "hooks"``), without fused layers.

Ways are timed in turn, ``--repeats`` times after one that is not counted; printed are medians. The share is (2 forward
passes' worth of floating-point operations: there and back to the activations, nothing for frozen weights) / seconds /
the rate of a large product measured in the same run. Out of memory at a batch size ends that model's rows, not the
script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from common import Ways, header, interleaved, line, parser, write_json

from fedlab.config import RunConfig
from fedlab.data import FederatedData
from fedlab.data.collate import Tokens
from fedlab.data.partition import Shards
from fedlab.lora.state import State
from fedlab.models.adapters import initial_state
from fedlab.models.hardware import GAIN, bfloat16_gain
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import adapt
from fedlab.objectives import Classification
from fedlab.privacy.plan import DPPlan
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining
from fedlab.train.trainer import train_client

LABELS, STEPS = 20, 3
WAYS = ("bare", "private", "cohort", "apart", "hooks")


def roberta_large(small: bool) -> tuple[torch.nn.Module, list[str], list[str]]:
    """Model, head modules, adapted modules."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, num_labels=LABELS, **(tiny if small else shape)
    )
    return RobertaForSequenceClassification(config), ["classifier"], ["query", "value"]


def llama_1b(small: bool) -> tuple[torch.nn.Module, list[str], list[str]]:
    """Model, head modules, adapted modules."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    shape = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, **heads}
    tiny = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=32000, max_position_embeddings=2048, num_labels=LABELS, **(tiny if small else shape)
    )
    return LlamaForSequenceClassification(config), ["score"], ["q_proj", "v_proj"]


MODELS: dict[str, Callable[[bool], tuple[torch.nn.Module, list[str], list[str]]]] = {
    "roberta-large": roberta_large,
    "llama-1b": llama_1b,
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table per model, and return model → batch → figures."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--small", action="store_true", help="tiny models and batches")
    args = options.parse_args(arguments)
    if args.small:
        args.batches, args.length, args.clients, args.repeats = [4], 16, 2, 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if bfloat16_gain(device.type) >= GAIN else torch.float32
    rate = matrix_rate(device, dtype, 512 if args.small else 8192 if device.type == "cuda" else 1024)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}, {str(dtype).removeprefix('torch.')} base, matrix rate {rate / 1e12:.2f} TFLOP/s", flush=True)
    results: dict[str, Any] = {"device": where, "dtype": str(dtype), "matrix_rate": rate, "models": {}}
    for name in args.models:
        results["models"][name] = measure(name, args, device, dtype, rate)
        write_json(args.json, results)
    return results


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of a square product, the best of five."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (seconds,) = timed({"product": lambda: a @ b}, 5, device)[0].values()
    return 2 * size**3 / min(seconds)


def timed(ways: Ways, repeats: int, device: torch.device) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Wall seconds of every way, to the end of what the GPU was given, and its peak memory there in bytes."""
    peak = dict.fromkeys(ways, 0)

    def before(way: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def after(way: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak[way] = max(peak[way], torch.cuda.max_memory_allocated())

    return interleaved(ways, repeats, time.perf_counter, before, after), peak


def measure(
    name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, rate: float
) -> dict[str, Any]:
    """Batch → seconds and ratios of one model."""
    torch.manual_seed(0)
    base, head, targets = MODELS[name](args.small)
    lora = f"[lora]\nrank=8\nalpha=8\ntarget_modules={json.dumps(targets)}"
    settings = RunConfig.parse(f"[run]\nrounds=1\n{lora}\n[train]\nlr=0.01\nsteps={STEPS}\n")
    tokenizer, objective = cast(Any, SimpleNamespace(pad_token_id=1)), Classification(tuple(map(str, range(LABELS))))
    model = adapt(base.to(dtype), head, tokenizer, settings.lora, name, device, objective)
    state = initial_state(model, settings.lora, 0)
    operations = 2 * forward_operations(model, args.length)
    print(
        f"\n{name}: {sum(p.numel() for p in model.module.parameters()) / 1e6:.0f} M parameters, texts of {args.length}"
        " tokens"
    )
    print(header("rows", *(f"{way} ex/s" for way in WAYS), "DP overhead", "share of matrix rate", "GB"))
    found: dict[str, Any] = {}
    for batch in args.batches:
        try:
            found[str(batch)] = figures = one_batch(model, settings, state, batch, args)
        except torch.cuda.OutOfMemoryError:
            print(line(batch, "out of memory"), flush=True)
            torch.cuda.empty_cache()
            break
        figures["share"] = figures["cohort"] * operations / rate
        rates = (f"{figures[way]:.1f}" for way in WAYS)
        print(line(batch, *rates, *(f"{figures[key]:.2f}" for key in ("overhead", "share", "gigabytes"))), flush=True)
    return found


def forward_operations(model: LoadedModel, length: int) -> int:
    """Of one text: two per weight of a linear layer and token, and the attention's two products."""
    weights = sum(m.weight.numel() for m in model.module.modules() if isinstance(m, torch.nn.Linear))
    config: Any = model.module.config
    return int(2 * length * weights + 4 * length**2 * config.hidden_size * config.num_hidden_layers)


def one_batch(
    model: LoadedModel, settings: RunConfig, state: State, batch: int, args: argparse.Namespace
) -> dict[str, float]:
    """Examples per second of each way, the overhead of DP (bare / cohort), and the peak memory of the cohort's pass."""
    names = sorted(n for n in state if n.endswith("lora_B") or n.startswith("head."))
    config = settings.model_copy(
        update={"train": settings.train.model_copy(update={"physical_batch": batch, "batch_size": batch})}
    )
    alone, data = texts(1, batch, args.length)
    several, shared = texts(min(args.clients, batch), batch, args.length)

    def plan(rows: int) -> DPPlan:
        return DPPlan(rows, rows, STEPS, 1.0, 1.0, 1e-5, 1, "seeded")  # q = 1: every step sees every row

    (client,) = alone
    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(model, state, names, data, batch),
        "private": lambda: train_cohort(model, data, [LocalTraining(client, state, plan(batch))], names, config, 1),
        "cohort": lambda: train_cohort(
            model, shared, [LocalTraining(c, state, plan(shared.size(c))) for c in several], names, config, 1
        ),
        "apart": lambda: [
            train_cohort(model, shared, [LocalTraining(c, state, plan(shared.size(c)))], names, config, 1)
            for c in several
        ],
        "hooks": lambda: train_client(model, data, client, state, names, config, 1, plan(batch)),
    }
    seconds, peak = timed({way: ways[way] for way in WAYS}, args.repeats, model.device)
    rates = {way: STEPS * batch / statistics.median(values) for way, values in seconds.items()}
    return {**rates, "overhead": rates["bare"] / rates["cohort"], "gigabytes": peak["cohort"] / 1e9}


def texts(clients: int, rows: int, length: int) -> tuple[list[str], FederatedData]:
    """Random tokens, dealt evenly."""
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 30000, rows * length).astype(np.int32)
    tokens = Tokens(ids, np.arange(rows + 1) * length, rng.integers(0, LABELS, rows))
    names = [f"client-{i}" for i in range(clients)]
    parts = {name: np.arange(rows)[i::clients] for i, name in enumerate(names)}
    nobody = np.array([], dtype=np.int64)
    return names, FederatedData(tokens, Shards(parts, dict.fromkeys(names, nobody), nobody))


def bare(model: LoadedModel, state: State, names: list[str], data: FederatedData, batch: int) -> None:
    """As many steps of plain SGD by autograd through peft's own layers."""
    model.load(state)
    parameters = [model.parameters[name].requires_grad_() for name in names]
    for _ in range(STEPS):
        rows = data.batch(np.arange(batch), 1)
        loss = model.objective.per_example_loss(model, rows).mean()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.01 * gradient
    model.module.requires_grad_(False)


if __name__ == "__main__":
    main()
