"""Does an adapter pay under DP? Strategies × {noise by each client alone, shared noise} at one ε, several seeds.

    python simulations/benchmarks/dp_adapter.py [--sets quickstart] [--methods head fedsvd] [--seeds 1 2] [--json FILE]

Every run spends the same ε on the same six clients and looks at the same number of records. *Each alone*: six rounds of
four steps of 64 records per client. *Shared noise*: 24 rounds of one step, into which a record enters with the
probability that makes 384 of all clients together; ``--survivors`` of the six shares of noise are counted on (6: the
noise is that of one DP-SGD on all records; fewer: more noise, and clients may be missing). Learning rates are in
``RATES``: one pair for all methods, which nobody tuned.

Sets: ``quickstart`` (docstrings of installed libraries, label = library), ``wordnet`` (glosses of nouns, label = class)
and ``packages`` (one-line descriptions of Debian's packages, label = section; made from ``apt-cache dumpavail``).
Finished runs are found again in ``--out``.
"""

from __future__ import annotations

import csv
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from common import PRESETS, header, line, mean_and_deviation, parser, write_json
from wordnet_table import run

ROWS = 384  # records of a step of all clients together
TRUST = ("each alone", "shared noise")
METHODS: dict[str, list[str]] = {
    "head": ["strategy.name=head"],
    "ffa": ["strategy.name=ffa"],
    "fedsvd": ["strategy.name=fedsvd"],
    "fedsvd (A from weights)": ["strategy.name=fedsvd", "lora.init_a=weights"],
    "fedsvd (moving)": ["strategy.name=fedsvd", "strategy.refresh={every=6, keep=4, source='random'}"],
    "fedavg": ["strategy.name=fedavg"],
    "rolora": ["strategy.name=rolora"],
    "fed-sb": ["strategy.name=fed-sb", "lora.rank=16", "lora.alpha=16"],
}
# learning rates of adapter and head; a method that is not named has the first
RATES = {
    "each alone": {"": (1.0, 5.0)},
    "shared noise": {"": (1.0, 3.0)},
}
# records that are trained on, and what makes the quickstart a run on this set
SETS: dict[str, tuple[int, list[str]]] = {
    "quickstart": (8990, ["data.test_fraction=0.1"]),
    "wordnet": (20000, ["data.source=wordnet", "data.subset=noun", "data.limit=20000", "data.test_fraction=0.03"]),
    "packages": (18000, ["data.source=files", "data.text=text", "data.label=section", "data.test_fraction=0.1"]),
}
SECTIONS, EACH = 16, 1250  # of packages: the largest sections, and descriptions of one at most


def packages(path: Path) -> Path:
    """A CSV of descriptions and sections of the packages that apt knows. Raises RuntimeError without apt's lists."""
    if path.is_file():
        return path
    try:
        told = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"--sets packages needs apt's lists: {error}") from None
    found: dict[str, str] = {}
    for entry in told.split("\n\n"):
        fields = dict(row.split(": ", 1) for row in entry.splitlines() if ": " in row and not row.startswith(" "))
        if {"Description", "Section"} <= fields.keys():
            found.setdefault(fields["Description"], fields["Section"].rpartition("/")[2])
    kept = {name for name, _ in Counter(found.values()).most_common(SECTIONS)}
    taken: Counter[str] = Counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "section"))
        for text, section in sorted(found.items()):
            if section in kept and taken[section] < EACH:
                taken[section] += 1
                writer.writerow((text, section))
    return path


def overrides(args: Any, name: str, method: str, trust: str, seed: int) -> list[str]:
    """What makes the preset this run."""
    records, data = SETS[name]
    rate, head = RATES[trust].get(method, RATES[trust][""])
    if name == "packages":
        data = [*data, f"data.path='{packages(args.out / 'packages.csv').absolute()}'"]
    made = [*data, *METHODS[method], f"train.lr={rate}", f"train.head_lr={head}", f"run.seed={seed}"]
    made += [f"privacy.epsilon={args.epsilon}", "evaluate.every=100", *args.overrides]
    if trust == "shared noise":
        made += [f"train.sampling_rate={ROWS / records}", f"privacy.survivors={args.survivors}", "privacy.colluding=0"]
    return made


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run, print the table, and return the results of every row."""
    options = parser(__doc__, "")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--trust", nargs="+", default=list(TRUST), choices=TRUST)
    options.add_argument("--epsilon", type=float, default=6.0)
    options.add_argument("--survivors", type=int, default=6, help="clients whose shares of noise are counted on")
    options.add_argument("--out", type=Path, default=Path("runs") / "benchmark-dp-adapter")
    args = options.parse_args(arguments)
    print(header("set", "noise", "method", "accuracy %", "loss", "ε", "MB up"), flush=True)
    rows: list[dict[str, Any]] = []
    for name in args.sets:
        for trust in args.trust:
            for method in args.methods:
                results = [one(args, name, trust, method, seed) for seed in args.seeds]
                rows.append({"set": name, "trust": trust, "method": method, "results": results})
                write_json(args.json, rows)
                print(shown(rows[-1]), flush=True)
    return rows


def one(args: Any, name: str, trust: str, method: str, seed: int) -> dict[str, Any]:
    """The result of one run."""
    config = args.config or PRESETS / ("quickstart.toml" if trust == "each alone" else "quickstart-shared.toml")
    words = f"{name}-{trust}-{method}-{args.epsilon:g}-{args.survivors}-{seed}"
    folder = "".join(letter if letter.isalnum() or letter in "-." else "" for letter in words.replace(" ", "-"))
    return run(config, overrides(args, name, method, trust, seed), args.out / folder)


def shown(row: dict[str, Any]) -> str:
    """One line of the table: mean ± standard deviation over seeds."""
    results = row["results"]
    accuracy = mean_and_deviation([100 * float(r["scores"]["accuracy"]) for r in results], 1)
    loss = mean_and_deviation([float(r["scores"]["loss"]) for r in results], 3)
    epsilon = max(float(r["epsilon"]) for r in results)
    return line(
        row["set"], row["trust"], row["method"], accuracy, loss, f"{epsilon:.2f}", f"{results[0]['bytes_up'] / 1e6:.1f}"
    )


if __name__ == "__main__":
    main()
