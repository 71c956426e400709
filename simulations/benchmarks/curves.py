"""Rounds of the WordNet preset by every way to simulate it: seconds, what went to neither training nor evaluation, and
the accuracy curve.

    python simulations/benchmarks/curves.py                      # five ways, three seeds, five rounds: about half an
    hour on two cores python simulations/benchmarks/curves.py --seeds 1 --rounds 2

The ways: one client at a time (``run.cohort=1``); as it comes; with what lies below the lowest adapter computed once
per text (``run.cache_hidden_states``); with a bfloat16 base where the processor multiplies it; and with both. They
take turns, seed by seed, on the same clients, batches and noise, so that curves differ by rounding alone. A round's
seconds leave out evaluation, and the first round, which loads models (and fills the cache)."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import half_range, header, line, mean_and_deviation, metrics, parser, write_json

import fedlab
from fedlab.config import RunConfig
from fedlab.models.hardware import bfloat16_gain

WAYS = {
    "sequential": ["run.cohort=1"],
    "cohort": [],
    "prefix cached": ["run.cache_hidden_states=true"],
    "bfloat16": ["run.dtype=bfloat16"],
    "bfloat16, prefix cached": ["run.dtype=bfloat16", "run.cache_hidden_states=true"],
}
Way = dict[str, Any]


def main(arguments: list[str] | None = None) -> dict[str, Way]:
    """Run, print two tables, and return way → figures."""
    options = parser(__doc__, "wordnet.toml")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = options.parse_args(arguments)
    print(f"bfloat16 products run at {bfloat16_gain('cpu'):.2f} of the speed of float32 here", flush=True)
    runs: dict[str, list[Way]] = {way: [] for way in args.ways}
    for seed in args.seeds:
        for way in args.ways:
            settings = [
                f"run.rounds={args.rounds}",
                "evaluate.every=1",
                f"run.seed={seed}",
                *WAYS[way],
                *args.overrides,
            ]
            runs[way].append(one(RunConfig.load(args.config, settings)))
            print(f"seed {seed}, {way}: {runs[way][-1]['seconds']} s, accuracy {runs[way][-1]['accuracy']}", flush=True)
    found = {way: summary(results) for way, results in runs.items()}
    print(tables(found))
    write_json(args.json, {"rounds": args.rounds, "seeds": args.seeds, "ways": found})
    return found


def one(config: RunConfig) -> Way:
    """Seconds and share of overhead of the rounds after the first, examples per second of training, and accuracy after
    every round.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = fedlab.simulate(config, Path(folder) / "run", quiet=True).path
        train, evaluations = metrics(path, "train")[1:], metrics(path, "evaluate")
    assert config.train.steps is not None
    examples = config.clients_per_round * config.train.steps * config.train.batch_size
    return {
        "seconds": [round(line["seconds"] - line["evaluate_seconds"], 3) for line in train],
        "overhead": [line["overhead_seconds"] / line["seconds"] for line in train],
        "examples": [examples / line["train_seconds"] for line in train],
        "accuracy": [round(line["scores"]["accuracy"], 4) for line in evaluations],
    }


def summary(results: list[Way]) -> Way:
    """Medians over rounds and seeds, half the range of the seconds, and the curves."""
    seconds, overhead, examples = (
        [value for r in results for value in r[key]] for key in ("seconds", "overhead", "examples")
    )
    return {
        "seconds": statistics.median(seconds),
        "spread": half_range(seconds),
        "overhead": statistics.median(overhead),
        "examples": statistics.median(examples),
        "curves": [r["accuracy"] for r in results],
    }


def tables(found: dict[str, Way]) -> str:
    """Two tables in markdown: speed, with ratios to ``cohort`` where it was run, and mean accuracy (± standard
    deviation) by round.
    """
    base = found.get("cohort", next(iter(found.values())))["seconds"]
    lines = ["\n" + header("way", "s per round", "examples/s", "faster than cohort", "overhead %")]
    for way, row in found.items():
        cells = [
            f"{row['seconds']:.2f} ± {row['spread']:.2f}",
            f"{row['examples']:.0f}",
            f"{base / row['seconds']:.2f}",
        ]
        lines.append(line(way, *cells, f"{100 * row['overhead']:.1f}"))
    rounds = len(next(iter(found.values()))["curves"][0])
    lines.append("\n" + header("accuracy % after round", *map(str, range(rounds))))
    for way, row in found.items():
        curves = zip(*row["curves"], strict=True)
        lines.append(line(way, *(mean_and_deviation([100 * value for value in values]) for values in curves)))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
