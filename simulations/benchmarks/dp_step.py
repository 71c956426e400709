"""One DP-SGD step of LoRA-B and head on MiniLM: fused layers, fedlab's hooks and Opacus' hooks against the non-private
step, interleaved. The non-private step and the fused layers also with a bfloat16 base (adapters, norms and sums in
float32), if the processor multiplies it.

    python simulations/benchmarks/dp_step.py [--repeats 7] [--batch 16] [--length 64] [--json FILE]

Prints processor seconds (one thread, median, half the range) and ratios to the non-private step of the same model. All
end with the clipped sum and add no noise: it is the cost of per-example gradients, their norms and their sum that is
compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from common import half_range, interleaved, parser, write_json

from fedlab.config import RunConfig
from fedlab.models.adapters import initial_state
from fedlab.models.hardware import bfloat16_gain
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import build
from fedlab.objectives import Classification
from fedlab.privacy.clipping import clipped_sum
from fedlab.train.dp import PerExampleGradients
from fedlab.train.fused import CohortLayers
from fedlab.train.opacus import OpacusGradients

CONFIG = '[run]\nrounds=1\n[lora]\nrank=8\nalpha=8\ntarget_modules="all-linear"\n[train]\nlr=1\nsteps=1\n'


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Measure, print, and return way → seconds."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--length", type=int, default=64)
    args = options.parse_args(arguments)
    torch.set_num_threads(1)
    config, objective = RunConfig.parse(CONFIG), Classification(tuple("0123456789"))
    model, half = (
        build(RunConfig.parse(CONFIG, [f"run.dtype={dtype}"]), objective) for dtype in ("float32", "bfloat16")
    )
    state = initial_state(model, config.lora, 0)
    for loaded in (model, half):
        loaded.load(state)
    names = [n for n in model.parameters if n.endswith("lora_B") or n.startswith("head.")]
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 20000, (args.batch, args.length), generator=generator),
        "attention_mask": torch.ones(args.batch, args.length, dtype=torch.long),
    }
    labels = torch.randint(0, 10, (args.batch,), generator=generator)

    def loss(model: LoadedModel) -> torch.Tensor:
        return objective.per_example_loss(model, batch | {"labels": labels}).sum()

    def plain(model: LoadedModel) -> None:
        parameters = [model.parameters[n].requires_grad_() for n in names]
        torch.autograd.grad(loss(model), parameters)
        model.module.requires_grad_(False)

    def fused(model: LoadedModel) -> None:
        with CohortLayers(model, {n: v[None] if n in names else v for n, v in state.items()}, names) as layers:
            layers.rows.owner = torch.zeros(args.batch, dtype=torch.long)
            loss(model).backward()
            clipped_sum(layers.take(), 1.0)

    def hooked(hooks: type[PerExampleGradients] | type[OpacusGradients]) -> None:
        with hooks(model, names) as found:
            loss(model).backward()
            clipped_sum(found.take(), 1.0)

    ways: dict[str, Callable[[], None]] = {
        "non-private": lambda: plain(model),
        "fused": lambda: fused(model),
        "fedlab hooks": lambda: hooked(PerExampleGradients),
        "opacus hooks": lambda: hooked(OpacusGradients),
    }
    if (gain := bfloat16_gain("cpu")) > 1:
        print(f"bfloat16 products run at {gain:.2f} of the speed of float32 here")
        ways |= {"non-private, bfloat16": lambda: plain(half), "fused, bfloat16": lambda: fused(half)}
    seconds = interleaved(ways, args.repeats)
    base = statistics.median(seconds["non-private"])
    for way, times in seconds.items():
        median = statistics.median(times)
        print(f"{way:21s} {median:.3f} ± {half_range(times):.3f} s  {median / base:.2f}")
    write_json(args.json, {"batch": args.batch, "length": args.length, "seconds": seconds})
    return seconds


if __name__ == "__main__":
    main()
