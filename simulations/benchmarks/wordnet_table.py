"""Accuracy of the strategies on WordNet × {no DP, ε = 6}, several seeds, learning rates tuned per method.

    python simulations/benchmarks/wordnet_table.py                       # everything, about an hour and a half on two
    cores python simulations/benchmarks/wordnet_table.py --rounds 4 --seeds 1  # a quick look

Protocol: for each (method, privacy) every learning rate of the grid is tried with one tuning seed (not among the
reported seeds); the best by held-out accuracy is then run with each reported seed. The number of rates tried is the
same for all. Runs go one after the other through ``fedlab.simulate``; finished ones are found again in ``--out``, those
that were cut off are resumed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import fedlab
from fedlab.run.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "simulations" / "wordnet.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tuning-rounds", type=int, help="rounds of a tuning run (default: as many as the others)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.5, 4.5])
    parser.add_argument(
        "--head-rate", type=float, help="learning rate of the head in every run (default: the adapter's)"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--privacy", nargs="+", default=list(PRIVACY), choices=list(PRIVACY))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmark-strategies")
    args = parser.parse_args()
    common = [*args.overrides, *([f"run.rounds={args.rounds}"] if args.rounds else [])]

    print(
        "| method | privacy | lr (of "
        + ", ".join(f"{r:g}" for r in args.rates)
        + ") | accuracy % | macro-F1 % | clients % | worst client % | ε | MB up | server s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    tuning = [f"run.rounds={args.tuning_rounds}"] if args.tuning_rounds else []
    for privacy in args.privacy:
        for method in args.methods:
            overrides = [*common, *METHODS[method], *PRIVACY[privacy]]
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
            print(row(method, privacy, rate, results), flush=True)


def score(result: dict[str, Any]) -> float:
    """Held-out accuracy; the clients' mean where there is no global model."""
    return float((result["scores"] or {"accuracy": result["client_scores"]["mean"]})["accuracy"])


def row(method: str, privacy: str, rate: float, results: list[dict[str, Any]]) -> str:
    """One line of the table: mean ± standard deviation over seeds."""

    def spread(values: list[float]) -> str:
        deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{100 * statistics.fmean(values):.2f}{deviation}" if values else "–"

    def column(key: str) -> list[float]:
        return [float(str(r[key])) for r in results if r[key] is not None]

    def scored(name: str) -> list[float]:
        return [float(r["scores"][name]) for r in results if r["scores"] is not None]

    mean, worst = ([float(r["client_scores"][key]) for r in results] for key in ("mean", "worst"))
    epsilon = results[0]["epsilon"]
    shown = epsilon if isinstance(epsilon, str) else f"{max(column('epsilon')):.2f}"
    return (
        f"| {method} | {privacy} | {rate:g} | {spread(scored('accuracy'))} | {spread(scored('macro_f1'))} |"
        f" {spread(mean)} | {spread(worst)} | {shown} | {statistics.fmean(column('bytes_up')) / 1e6:.1f} |"
        f" {statistics.fmean(column('overhead_seconds_per_round')):.2f} |"
    )


if __name__ == "__main__":
    main()
