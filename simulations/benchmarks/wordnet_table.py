"""Accuracy of the strategies on WordNet × {no DP, ε = 6}, several seeds, learning rates tuned per method.

    python simulations/benchmarks/wordnet_table.py                       # everything, about an hour and a half on two
    cores python simulations/benchmarks/wordnet_table.py --rounds 4 --seeds 1  # a quick look

Protocol: for each (method, privacy) every learning rate of the grid is tried with one tuning seed (not among the
reported seeds); the best by held-out accuracy is then run with each reported seed. The number of rates tried is the
same for all. Runs go one after the other through ``fedlab.simulate``; finished ones are found again in ``--out``, those
that were cut off are resumed.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from common import header, line, mean_and_deviation, parser, write_json

import fedlab
from fedlab.run.directory import RunDirectory

COLUMNS = ("accuracy %", "macro-F1 %", "clients %", "worst client %", "ε", "MB up", "server s")
# Kaiming rows have norm 1/√3, so its adapter steps are made three times longer, the head's are not: the same grid of
# effective steps.
ADAPTER_STEP = {"ffa (kaiming)": 3.0}
METHODS = {
    "head": ["strategy.name=head"],
    "fedavg": ["strategy.name=fedavg"],
    "ffa (kaiming)": ["strategy.name=ffa", "lora.init_a=kaiming"],
    "ffa (orthonormal)": ["strategy.name=ffa", "lora.init_a=orthonormal"],
    "fedsvd": ["strategy.name=fedsvd", "lora.init_a=orthonormal"],
    "fedsvd (A from weights)": ["strategy.name=fedsvd", "lora.init_a=weights"],
    "fedsvd (moving, random)": ["strategy.name=fedsvd", "strategy.refresh={every=1, keep=4, source='random'}"],
    "fedsvd (moving, weights)": [
        "strategy.name=fedsvd",
        "lora.init_a=weights",
        "strategy.refresh={every=1, keep=4, source='weights'}",
    ],
    "flora (B only)": ["strategy.name=flora", "strategy.train=B"],
    "flora": ["strategy.name=flora"],
    "fedex": ["strategy.name=fedex"],
    "flexlora": ["strategy.name=flexlora"],
    "rolora": ["strategy.name=rolora"],
    "lora-fair": ["strategy.name=lora-fair"],
    "hetlora": ["strategy.name=hetlora"],
    "hetlora (half the clients of rank 2)": ["strategy.name=hetlora", "clients.rank={'50%'=2}"],
    "flexlora (half the clients of rank 2)": ["strategy.name=flexlora", "clients.rank={'50%'=2}"],
    "fedsvd (half the clients of rank 2)": ["strategy.name=fedsvd", "clients.rank={'50%'=2}"],
    "fedsvd (server momentum)": ["strategy.name=fedsvd", "strategy.server={optimizer='momentum', beta1=0.5}"],
    "fedsa": ["strategy.name=fedsa"],
}
PRIVACY: dict[str, list[str]] = {"no DP": ["privacy={unit='none'}"], "ε = 6": ["privacy.epsilon=6"]}
TUNING_SEED = 1000


def run(config: Path, overrides: list[str], out: Path) -> dict[str, Any]:
    """Result of one run: from disk if it is there, resumed if it was cut off."""
    if (out / "run.toml").is_file():
        found = RunDirectory(out).result
        return found if found and found["status"] == "completed" else fedlab.resume(out, quiet=True).result
    return fedlab.simulate(fedlab.RunConfig.load(config, overrides), out, quiet=True).result


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run, print the table, and return the results of every row."""
    options = parser(__doc__, "wordnet.toml")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--rounds", type=int)
    options.add_argument("--tuning-rounds", type=int, help="rounds of a tuning run (default: as many as the others)")
    options.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.5, 4.5])
    options.add_argument(
        "--head-rate", type=float, help="learning rate of the head in every run (default: the adapter's)"
    )
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--privacy", nargs="+", default=list(PRIVACY), choices=list(PRIVACY))
    options.add_argument("--out", type=Path, default=Path("runs") / "benchmark-strategies")
    args = options.parse_args(arguments)
    settings = [*args.overrides, *([f"run.rounds={args.rounds}"] if args.rounds else [])]

    tried = ", ".join(f"{rate:g}" for rate in args.rates)
    print(header("method", "privacy", f"lr (of {tried})", *COLUMNS), flush=True)
    rows: list[dict[str, Any]] = []
    tuning = [f"run.rounds={args.tuning_rounds}"] if args.tuning_rounds else []
    for privacy in args.privacy:
        for method in args.methods:
            overrides = [*settings, *METHODS[method], *PRIVACY[privacy]]
            folder = args.out / f"{method}-{privacy}".replace("ε", "eps")
            folder = folder.with_name(
                "".join(c if c.isalnum() or c in "-." else "" for c in folder.name.replace("(", "-"))
            )

            def result(rate: float, seed: int, name: str, *more: str) -> dict[str, Any]:
                rates = [
                    f"train.lr={rate * ADAPTER_STEP.get(method, 1.0)}",  # noqa: B023
                    f"train.head_lr={args.head_rate or rate}",
                ]
                return run(args.config, [*overrides, *rates, f"run.seed={seed}", *more], folder / name)  # noqa: B023

            tuned = {rate: result(rate, TUNING_SEED, f"tune-{rate:g}", *tuning) for rate in args.rates}
            rate = max(tuned, key=lambda r: score(tuned[r]))
            results = [result(rate, seed, f"seed-{seed}-lr-{rate:g}") for seed in range(1, args.seeds + 1)]
            rows.append({"method": method, "privacy": privacy, "rate": rate, "results": results})
            write_json(args.json, rows)
            print(row(method, privacy, rate, results), flush=True)
    return rows


def score(result: dict[str, Any]) -> float:
    """Held-out accuracy; the clients' mean where there is no global model."""
    return float((result["scores"] or {"accuracy": result["client_scores"]["mean"]})["accuracy"])


def row(method: str, privacy: str, rate: float, results: list[dict[str, Any]]) -> str:
    """One line of the table: mean ± standard deviation over seeds."""

    def spread(values: list[float]) -> str:
        return mean_and_deviation([100 * value for value in values])

    def column(key: str) -> list[float]:
        return [float(str(r[key])) for r in results if r[key] is not None]

    def scored(name: str) -> list[float]:
        return [float(r["scores"][name]) for r in results if r["scores"] is not None]

    mean, worst = ([float(r["client_scores"][key]) for r in results] for key in ("mean", "worst"))
    epsilon = results[0]["epsilon"]
    shown = epsilon if isinstance(epsilon, str) else f"{max(column('epsilon')):.2f}"
    scores = (spread(values) for values in (scored("accuracy"), scored("macro_f1"), mean, worst))
    megabytes = f"{statistics.fmean(column('bytes_up')) / 1e6:.1f}"
    seconds = f"{statistics.fmean(column('overhead_seconds_per_round')):.2f}"
    return line(method, privacy, f"{rate:g}", *scores, shown, megabytes, seconds)


if __name__ == "__main__":
    main()
