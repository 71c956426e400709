"""How much a federation forgets: every continual strategy and its baselines on one stream, several seeds.

    python simulations/benchmarks/continual_table.py                          # simulations/continual-wordnet.toml,
    three seeds python simulations/benchmarks/continual_table.py --methods fedavg osft-data --seeds 1 --set run.rounds=2

Columns: average accuracy (AA) after the last task, backward transfer (BWT, negative: forgetting), forgetting (F),
learning accuracy (LA, each task just after it was trained), largest share of a change inside what was protected, bytes
with bases, ε, seconds. The learning rate of every method is the best AA of ``--rates`` on the first two tasks and a
seed of its own, a fifth of these for methods that train whole matrices, whose entries all add up, and fifty times these
for SGD under DP; replay trains on 20 % of every earlier task's texts again, joint on all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import header, line, mean_and_deviation, parser, write_json

import fedlab
from fedlab.config import RunConfig

# Under DP few long steps on large batches: every step is noise, and AdamW would scale it up to a step of full length.
DP = [
    'privacy={unit="example", epsilon=8.0, clip=1.0}',
    "train.optimizer=sgd",
    "train.momentum=0.9",
    "train.batch_size=64",
]
DP += ["train.steps=4", "train.head_lr=5"]
# method → settings that differ from the configuration's
METHODS: dict[str, list[str]] = {
    "fedavg (sequential LoRA)": ['strategy={name="fedavg"}'],
    "full (sequential)": ['strategy={name="full"}'],
    "o-lora": ['strategy={name="o-lora"}'],
    "osft": ['strategy={name="osft"}'],
    "osft-data": [],
    "fedsvd-continual": ["strategy.name=fedsvd-continual"],
    "replay (fedavg)": ['strategy={name="fedavg"}', "stream.replay=0.2"],
    "joint (fedavg)": ['strategy={name="fedavg"}', "stream.joint=true"],
    "fedsvd-continual, ε = 8": ["strategy.name=fedsvd-continual", *DP],
    "osft-data, ε = 8": DP,
    "ffa (sequential), ε = 8": ['strategy={name="ffa"}', *DP],
}
WHOLE = 0.2  # rates of methods that train whole matrices, relative to those of factors of rank 8
PRIVATE = 50.0  # rates of SGD under DP, relative to AdamW's
COLUMNS = ("average_score", "backward_transfer", "forgetting", "learning_score")


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Run, print the table, and return method → its results, one per seed."""
    options = parser(__doc__, "continual-wordnet.toml")
    options.add_argument(
        "--methods", nargs="+", default=list(METHODS), help="names of rows, or the first words of several"
    )
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument(
        "--rates", type=float, nargs="*", default=[0.002, 0.006, 0.02], help="of rank-8 factors; one: no tuning"
    )
    options.add_argument("--tuning-seed", type=int, default=100)
    args = options.parse_args(arguments)
    kept: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    found: dict[str, list[dict[str, Any]]] = {}
    columns = ("method", "lr", "AA %", "BWT", "F", "LA %", "leak", "MB up", "MB down", "ε", "s")
    print(header(*columns), flush=True)
    for method in METHODS:
        if method not in args.methods and not any(
            method.startswith((f"{name} ", f"{name},")) for name in set(args.methods) - METHODS.keys()
        ):
            continue
        rate = _best_rate(args, method, kept)
        found[method] = [_one(args, method, rate, seed, kept) for seed in args.seeds]
        print(row(method, rate, found[method]), flush=True)
    return found


def _best_rate(args: argparse.Namespace, method: str, kept: dict[str, Any]) -> float | None:
    factor = (WHOLE if method.startswith(("full", "osft")) else 1) * (PRIVATE if "ε" in method else 1)
    rates = [round(rate * factor, 9) for rate in args.rates]
    if len(rates) < 2:
        return rates[0] if rates else None
    scores = {rate: _one(args, method, rate, args.tuning_seed, kept, tasks=2)["average_score"] for rate in rates}
    return max(scores, key=lambda rate: -math.inf if scores[rate] is None else scores[rate])


def _one(
    args: argparse.Namespace, method: str, rate: float | None, seed: int, kept: dict[str, Any], tasks: int | None = None
) -> dict[str, Any]:
    settings = [
        *METHODS[method],
        f"run.seed={seed}",
        *([f"train.lr={rate}"] if rate is not None else []),
        *args.overrides,
    ]
    name = json.dumps([str(args.config.name), *settings, *([tasks] if tasks else [])])
    if name not in kept:
        config = RunConfig.load(args.config, settings)
        with tempfile.TemporaryDirectory() as folder:
            config = config.model_copy(update={"tasks": config.tasks[:tasks]})
            kept[name] = dict(fedlab.simulate(config, Path(folder) / "run", quiet=True).result)
        write_json(args.json, kept)  # a finished run is not run again
    return dict(kept[name])


def row(method: str, rate: float | None, results: list[dict[str, Any]]) -> str:
    """One line of the table: mean ± standard deviation over seeds."""
    cells = [method, "–" if rate is None else f"{rate:g}"]
    for column in COLUMNS:
        values = [100 * r[column] for r in results if r.get(column) is not None]
        cells.append(mean_and_deviation(values))
    leaks = [r["leak"] for r in results if r["leak"] is not None]
    cells.append(f"{max(leaks):.0e}" if leaks else "–")
    cells += [f"{statistics.fmean(r[key] for r in results) / 1e6:.1f}" for key in ("bytes_up", "bytes_down")]
    epsilons = [r["epsilon"] for r in results]
    cells.append(f"{max(epsilons):.2f}" if all(isinstance(e, float) for e in epsilons) else "no DP")
    cells.append(f"{statistics.fmean(r['seconds'] for r in results):.0f}")
    return line(*cells)


if __name__ == "__main__":
    main()
