"""Server time of the aggregators for the adapters of a 7B model, and of FedSVD's refactorisation against the SVD of the
formed product.

    python simulations/benchmarks/aggregation.py          # a few minutes
    python simulations/benchmarks/aggregation.py --full   # and one dense SVD of each of the model's shapes, several
    minutes more

Shapes: 32 layers of q, k, v, o (4096×4096), gate, up (11008×4096) and down (4096×11008): 224 modules. Everything is in
processor seconds of one thread (on an idle core the same as seconds), the ways of one table are interleaved, and the
first run of each is a warm-up, except for the dense SVDs of ``--full``, which run once. Three tables:

1. FedSVD's whole aggregation, from the clients' float32 changes of B to the new (B, A). One layer's changes are drawn,
timed and thrown
   away before the next's, so that all clients' changes of a layer are in memory, never those of the model (4.3 GB for
   50 clients).
2. ``refactorize`` of one module, in float64, against what the published code does: form B·A in float32,
``torch.linalg.svd`` with
   ``full_matrices=False``, keep r; and against ``torch.svd_lowrank`` (q = r) of the same formed product. "error" is the
   relative Frobenius error of the product, in the order of the columns. The whole set by the dense SVD is extrapolated
   by counts: with ``--full`` from one module of each shape, otherwise from the largest square measured by the cube of a
   module's smaller side, which is a lower bound.
3. Each aggregator on one module of the first shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import header, parser, write_json
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.lora.average import client_weights
from fedlab.lora.state import State
from fedlab.lora.svd import orthonormal_rows, refactorize, refactorize_state
from strategies import STRATEGIES
from strategies.base import Round, Strategy

LAYER = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
LAYER |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}  # m × n
SQUARES = (1024, 2048)
SMALL = 32  # divides every size in --small
AGGREGATORS: dict[str, dict[str, str]] = {
    "fedavg": {},
    "ffa": {},
    "fedsvd": {},
    "fedex": {},
    "flora": {},
    "flexlora": {},
    "flexlora, fisher": {"fisher": "updates"},
}
Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the three tables; return, and write to ``--json``, their numbers."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--full", action="store_true", help="one dense SVD of each of the model's shapes as well")
    options.add_argument(
        "--small", action="store_true", help=f"every size divided by {SMALL}: shows that it runs, measures nothing"
    )
    args = options.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure(args)
    finally:
        torch.set_num_threads(threads)
    write_json(args.json, found)
    report(found)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of the three tables."""
    divisor = SMALL if args.small else 1
    layer = {name: (m // divisor, n // divisor) for name, (m, n) in LAYER.items()}
    squares = [size // divisor for size in SQUARES]
    counts = {shape: args.layers * list(layer.values()).count(shape) for shape in layer.values()}
    generator = torch.Generator().manual_seed(0)
    shapes = {(size, size): args.repeats for size in squares} | (dict.fromkeys(counts, 0) if args.full else {})
    dense = [compare(m, n, args.rank, repeats, generator) for (m, n), repeats in shapes.items()]
    whole = {**whole_set(layer, args, generator), "modules": sum(counts.values())}
    if args.full:
        seconds = {(row["m"], row["n"]): row["dense"]["median"] for row in dense}
        whole["dense"] = sum(count * seconds[shape] for shape, count in counts.items())
    else:
        largest = dense[-1]
        whole["dense"] = sum(
            c * largest["dense"]["median"] * (min(shape) / largest["m"]) ** 3 for shape, c in counts.items()
        )
    settings = {
        "layers": args.layers,
        "clients": args.clients,
        "rank": args.rank,
        "repeats": args.repeats,
        "full": args.full,
    }
    return {
        "settings": {**settings, "torch": torch.__version__, "threads": 1},
        "whole": {**whole, "ratio": whole["dense"] / whole["refactorize"]},
        "modules": dense,
        "aggregators": one_module(next(iter(layer.values())), args, generator),
    }


def whole_set(
    layer: dict[str, tuple[int, int]], args: argparse.Namespace, generator: torch.Generator
) -> dict[str, Any]:
    """Processor seconds of FedSVD.aggregate over all layers, and of the refactorisation in it."""
    fedsvd, ffa = strategy("fedsvd", args.rank), strategy("ffa", args.rank)
    total, part = [], []
    for number in range(args.layers + 1):  # the first warms up
        state, updates, weights = round_of(fedsvd, layer, args, generator)
        averaged = after_round(ffa, state, updates, weights)
        total.append(timed(lambda s=state, u=updates, w=weights: after_round(fedsvd, s, u, w)))
        part.append(timed(lambda a=averaged: refactorize_state(a)))
        if number == 0:
            both = refactorize_state(averaged), after_round(fedsvd, state, updates, weights)
            if not all(torch.equal(both[0][name], both[1][name]) for name in state):
                raise RuntimeError(
                    "the mean and its refactorisation are not what FedSVD does: the parts timed are of something else"
                )
    seconds = {"fedsvd": sum(total[1:]), "refactorize": sum(part[1:])}
    return {**seconds, "mean": seconds["fedsvd"] - seconds["refactorize"], "layer": spread(total[1:])}


def compare(m: int, n: int, rank: int, repeats: int, generator: torch.Generator) -> dict[str, Any]:
    """One module by three ways, interleaved. repeats = 0: the dense SVD once, the others three times around it."""
    B = torch.randn(m, rank, generator=generator)
    A = orthonormal_rows(torch.randn(rank, n, generator=generator))
    ways: dict[str, Way] = {"refactorize": refactorize, "lowrank": by_lowrank, "dense": by_dense}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, float] = {}
    for step in range(max(repeats, 3) + 1):
        for name, way in ways.items():
            if repeats or name != "dense" or step == 1:
                seconds[name].append(timed(lambda way=way: way(B, A)))
    wanted = B.double() @ A.double()
    for name, way in ways.items():
        if repeats or name != "dense":  # a dense SVD of minutes is not run again for its error
            B2, A2 = way(B, A)
            errors[name] = float((B2.double() @ A2.double() - wanted).norm() / wanted.norm())
    rows = {name: spread(times if name == "dense" and not repeats else times[1:]) for name, times in seconds.items()}
    ratios = {
        f"{name} / refactorize": rows[name]["median"] / rows["refactorize"]["median"] for name in ("dense", "lowrank")
    }
    return {"m": m, "n": n, **rows, "errors": errors, "ratios": ratios}


def by_dense(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    r = A.shape[0]
    return U[:, :r] @ torch.diag(S[:r]), Vt[:r]


def by_lowrank(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    U, S, V = torch.svd_lowrank(B @ A, q=A.shape[0])
    return U * S, V.mT


def one_module(
    shape: tuple[int, int], args: argparse.Namespace, generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """Processor seconds of every aggregator on one module with all clients."""
    made = {title: strategy(title.partition(",")[0], args.rank, **options) for title, options in AGGREGATORS.items()}
    rounds = {title: round_of(each, {"q": shape}, args, generator) for title, each in made.items()}
    seconds: dict[str, list[float]] = {title: [] for title in made}
    for _ in range(args.repeats + 1):
        for title, each in made.items():
            seconds[title].append(timed(lambda each=each, given=rounds[title]: after_round(each, *given)))
    return {title: spread(times[1:]) for title, times in seconds.items()}


def strategy(name: str, rank: int, **options: str) -> Strategy:
    text = f'[run]\nrounds=1\n[lora]\nrank={rank}\nalpha={rank}\n[train]\nlr=1\nsteps=1\n[strategy]\nname="{name}"\n'
    config = RunConfig.parse(text, [f"strategy.{key}={value}" for key, value in options.items()])
    return STRATEGIES[name](config)


def after_round(each: Strategy, state: State, updates: dict[str, State], weights: dict[str, float]) -> State:
    """The state after the first round."""
    return each.aggregate(state, each.init(state), updates, weights, Round(1))[0]


def round_of(
    each: Strategy, layer: dict[str, tuple[int, int]], args: argparse.Namespace, generator: torch.Generator
) -> tuple[State, dict[str, State], dict[str, float]]:
    """A state, every client's update of what the strategy trains, and unequal weights."""
    state: State = {}
    for module, (m, n) in layer.items():
        state[f"{module}.lora_A"] = orthonormal_rows(torch.randn(args.rank, n, generator=generator))
        state[f"{module}.lora_B"] = torch.randn(m, args.rank, generator=generator)
    names, clients = each.trained_names(state), [f"client-{i}" for i in range(args.clients)]
    updates = {
        client: {name: torch.randn(state[name].shape, generator=generator) for name in names} for client in clients
    }
    return state, updates, client_weights({client: 10 + i for i, client in enumerate(clients)}, "examples")


def timed(step: Callable[[], object]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def spread(times: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def report(found: dict[str, Any]) -> None:
    whole, settings = found["whole"], found["settings"]
    print(
        f"{whole['modules']} modules, rank {settings['rank']}, {settings['clients']} clients, torch"
        f" {settings['torch']}, one thread\n"
    )
    print(header("FedSVD, whole set", "processor s"))
    print(f"| aggregation | {whole['fedsvd']:.2f} |")
    print(f"| of which the weighted mean of B | {whole['mean']:.2f} |")
    print(f"| of which refactorize | {whole['refactorize']:.2f} |")
    low, high = whole["layer"]["min"], whole["layer"]["max"]
    print(f"| one layer: median (min – max) | {whole['layer']['median']:.3f} ({low:.3f} – {high:.3f}) |")
    bound = "extrapolated by counts" if settings["full"] else "at least, extrapolated from the largest square"
    print(f"| dense SVDs instead of refactorize, {bound} | {whole['dense']:,.0f} |")
    print(f"| ratio | {whole['ratio']:,.0f} |\n")
    print(
        "| m×n | refactorize, s (min – max) | dense SVD, s (min – max) | ratio | svd_lowrank, s (min – max) | ratio |"
        " errors |\n" + "|---" * 7 + "|"
    )
    for row in found["modules"]:
        cells = [
            "{median:.4f} ({min:.4f} – {max:.4f})".format(**row[way]) for way in ("refactorize", "dense", "lowrank")
        ]
        ratios = [f"{row['ratios'][f'{way} / refactorize']:,.1f}" for way in ("dense", "lowrank")]
        errors = ", ".join(
            f"{row['errors'][way]:.0e}" if way in row["errors"] else "–" for way in ("refactorize", "dense", "lowrank")
        )
        print(
            f"| {row['m']}×{row['n']} | {cells[0]} | {cells[1]} | {ratios[0]} | {cells[2]} | {ratios[1]} | {errors} |"
        )
    print("\n" + header("aggregator, one module", "processor s (min – max)"))
    for title, times in found["aggregators"].items():
        print(f"| {title} | {times['median']:.4f} ({times['min']:.4f} – {times['max']:.4f}) |")


if __name__ == "__main__":
    main()
