"""Instruction tuning: held-out loss and ROUGE-L before and after, with and without DP, strategies and seeds.

    python simulations/benchmarks/instruct_table.py [--seeds 3] [--methods ffa fedsvd …] [--json FILE]

Runs ``simulations/instruct-wordnet.toml`` for every method, with its own privacy and without any. Without DP as many
rows are spent as a client would spend them who need not hide them: AdamW in steps of 16, not one step of 96. The
learning rates were chosen with a seed that is not reported. "Kept" is the share of the non-private gain in held-out
loss that remains under DP. Finished runs are found again in ``--out``, those that were cut off are resumed.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common import header, line, mean_and_deviation, metrics, parser, write_json
from wordnet_table import run

METHODS = {
    "ffa": ["strategy.name=ffa"],
    "fedsvd": ["strategy.name=fedsvd"],
    "fedavg": ["strategy.name=fedavg"],
    "rolora": ["strategy.name=rolora"],
    "flora": ["strategy.name=flora"],
    "fedex": ["strategy.name=fedex"],
}
OPEN = [
    "privacy={unit='none'}",
    "train.optimizer=adamw",
    "train.steps=6",
    "train.batch_size=8",
    "train.physical_batch=8",
]
RATES = {"ε = 6": 14.0, "no DP": 2e-2}


def one(args: Any, method: str, privacy: str, rate: float, seed: int) -> dict[str, Any]:
    """Scores before and after of one run, and its ε."""
    private = [] if privacy == "ε = 6" else OPEN
    out = args.out / f"{method}-{'dp' if not private else 'open'}-{rate:g}-{seed}"
    overrides = [*args.overrides, *METHODS[method], *private, f"train.lr={rate}", f"run.seed={seed}"]
    result = run(args.config, overrides, out)
    before = metrics(out, "evaluate")[0]["scores"]
    return {"before": before, "after": result["scores"], "epsilon": result["epsilon"]}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print the table, and return method → privacy → one entry per seed."""
    options = parser(__doc__, "instruct-wordnet.toml")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--rate", type=float, help="learning rate under DP")
    options.add_argument("--open-rate", type=float, help="learning rate without DP")
    options.add_argument("--out", type=Path, default=Path("runs") / "benchmark-instruct")
    args = options.parse_args(arguments)
    rates = {"ε = 6": args.rate or RATES["ε = 6"], "no DP": args.open_rate or RATES["no DP"]}
    print(
        header("method", "privacy", "loss before", "loss after", "kept %", "ROUGE-L before", "after", "ε"), flush=True
    )
    found: dict[str, Any] = {}
    for method in args.methods:
        rows = {p: [one(args, method, p, rate, seed) for seed in range(1, args.seeds + 1)] for p, rate in rates.items()}
        found[method] = rows
        write_json(args.json, found)
        gains = {p: [r["before"]["loss"] - r["after"]["loss"] for r in runs] for p, runs in rows.items()}
        kept = [100 * a / b for a, b in zip(gains["ε = 6"], gains["no DP"], strict=True)]
        for privacy, runs in rows.items():
            print(shown(method, privacy, runs, kept if privacy == "ε = 6" else []), flush=True)
    return found


def shown(method: str, privacy: str, runs: list[dict[str, Any]], kept: list[float]) -> str:
    """One line of the table: mean ± standard deviation over seeds."""

    def scored(when: str, name: str, digits: int) -> str:
        return mean_and_deviation([float(r[when][name]) for r in runs], digits)

    epsilon = runs[0]["epsilon"]
    return line(
        method,
        privacy,
        f"{statistics.fmean(r['before']['loss'] for r in runs):.3f}",
        scored("after", "loss", 3),
        mean_and_deviation(kept, 0),
        f"{statistics.fmean(r['before']['rouge_l'] for r in runs):.3f}",
        scored("after", "rouge_l", 3),
        epsilon if isinstance(epsilon, str) else f"{max(float(r['epsilon']) for r in runs):.2f}",
    )


if __name__ == "__main__":
    main()
