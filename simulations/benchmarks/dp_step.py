"""One DP-SGD step of LoRA-B and head on MiniLM: fedlab's hooks and Opacus' hooks against the non-private step, interleaved.

    python simulations/benchmarks/dp_step.py [--repeats 7] [--batch 16] [--length 64]

Prints processor seconds (one thread, median) and ratios to the non-private step of the same model. All three clip nothing and add no noise
in the timed part: it is the cost of per-example gradients and their norms that is compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleModule
from torch.nn.functional import cross_entropy

from fedlab.adapters import initial_state
from fedlab.config import RunConfig
from fedlab.models import LoadedModel, build
from fedlab.privacy.clipping import clipped_sum
from fedlab.train.dp import PerExampleGradients

CONFIG = '[run]\nrounds=1\n[lora]\nrank=8\nalpha=8\ntarget_modules="all-linear"\n[train]\nlr=1\nsteps=1\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = RunConfig.parse(CONFIG)
    model = build(config, 10)
    model.load(initial_state(model, config.lora, 0))
    names = [n for n in model.parameters if n.endswith("lora_B") or n.startswith("head.")]
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 20000, (args.batch, args.length), generator=generator),
        "attention_mask": torch.ones(args.batch, args.length, dtype=torch.long),
    }
    labels = torch.randint(0, 10, (args.batch,), generator=generator)

    def loss(module: Callable[..., object] | None = None) -> torch.Tensor:
        logits = model.logits(batch) if module is None else module(**batch).logits  # type: ignore[attr-defined]
        return cross_entropy(logits, labels, reduction="sum")

    def plain() -> None:
        torch.autograd.grad(loss(), [model.parameters[n] for n in names])

    def ours() -> None:
        with PerExampleGradients(model, names) as hooks:
            loss().backward()
            clipped_sum(hooks.take(), 1.0)

    seconds: dict[str, list[float]] = {"non-private": [], "fedlab": [], "opacus hooks": []}
    for _ in range(args.repeats + 1):
        require(model, names, True)
        seconds["non-private"].append(timed(plain))
        require(model, names, False)
        seconds["fedlab"].append(timed(ours))
        require(model, names, True)
        for name in names:
            model.owners[name].train()
        wrapped = GradSampleModule(model.module, batch_first=True, loss_reduction="sum", strict=False)

        def opacus(wrapped: GradSampleModule = wrapped) -> None:
            loss(wrapped).backward()
            clipped_sum({n: model.parameters[n].grad_sample for n in names}, 1.0)

        seconds["opacus hooks"].append(timed(opacus))
        wrapped.remove_hooks()
        for name in names:
            model.parameters[name].grad = model.parameters[name].grad_sample = None
            model.owners[name].eval()
    base = statistics.median(seconds["non-private"][1:])  # the first round warms up
    for way, times in seconds.items():
        median = statistics.median(times[1:])
        print(f"{way:14s} {median:.3f} s  {median / base:.2f}")


def require(model: LoadedModel, names: list[str], on: bool) -> None:
    for name in names:
        model.parameters[name].requires_grad_(on)


def timed(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


if __name__ == "__main__":
    main()
