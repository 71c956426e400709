"""Seconds of a federated round: fedlab, a plain Flower app with Opacus and peft, and the floor. Side by side, in one
run.

    python simulations/benchmarks/rounds.py                       # 50 clients, batches of 4 and 32; about 25 minutes on
    two cores python simulations/benchmarks/rounds.py --small               # a few clients and one repeat

All ways do the same work on the same model, clients, tokens, expected batches, clip and noise: B of every adapted layer
and the head by DP-SGD, in ``--nodes`` processes with one torch thread each. The ways:

- sequential: fedlab, one client at a time (``run.cohort=1``);
- cohort: fedlab as it comes;
- cohort auto: the same with ``run.dtype=auto``, a bfloat16 base where the processor multiplies it faster;
- flower kept: a plain Flower message-API app (``plain_flower.py``) whose model stays loaded between messages;
- flower: the same app as Flower's example is written, with a model built for each message;
- bare: the floor. As many processes as nodes, each a loop of stock peft and autograd over its share of the examples,
  without DP, clients,
  messages or ledgers.

A round is timed on the server from the first message to the aggregated model, start-up, the first round (which loads
models) and evaluation left out. Every way runs in a process of its own, in turn, ``--repeats`` times; printed are
medians over rounds and repeats, half the range, and ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, half_range, header, line, metrics, parser, write_json

WAYS = ("sequential", "cohort", "cohort auto", "flower kept", "flower", "bare")
RATIOS = tuple((slow, fast) for fast in ("cohort", "cohort auto") for slow in ("sequential", "flower kept", "flower"))
RATIOS += (("cohort", "bare"), ("cohort auto", "bare"))
SETTINGS = {"sequential": ["run.cohort=1"], "cohort auto": ["run.dtype=auto"]}
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table and return batch size → way → figures, and ratios."""
    options = parser(__doc__, "quickstart.toml")
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--nodes", type=int, default=2)
    options.add_argument("--batches", type=int, nargs="+", default=[4, 32])
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--rounds", type=int, default=2, help="that are timed, after one that is not")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    options.add_argument("--small", action="store_true", help="4 clients, one repeat of one round")
    options.add_argument("--one", help=argparse.SUPPRESS)  # a way: run it here and print its rounds as JSON
    options.add_argument("--share", type=int, help=argparse.SUPPRESS)  # of the bare loop: which process this is
    args = options.parse_args(arguments)
    if args.small:
        args.clients, args.batches, args.steps, args.rounds, args.repeats = 4, args.batches[:1], 1, 1, 1
    if args.one:
        print(json.dumps(one(args)))
        return {}
    results: dict[str, Any] = {}
    for batch in args.batches:
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
        for _ in range(args.repeats):
            for way in args.ways:
                rounds[way] += in_its_own_process(args, way, batch)
        results[str(batch)] = summary(rounds)
        print(table(batch, args, results[str(batch)]), flush=True)
        write_json(args.json, {"arguments": vars(args), "cores": os.cpu_count(), "results": results})
    return results


def in_its_own_process(
    args: argparse.Namespace, way: str, batch: int, share: int | None = None
) -> list[dict[str, float]]:
    """The timed rounds of one way."""
    process = start(args, way, batch, share)
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{way} failed:\n{errors[-3000:]}")
    return json.loads(output.strip().splitlines()[-1])  # type: ignore[no-any-return]


def start(args: argparse.Namespace, way: str, batch: int, share: int | None = None) -> subprocess.Popen[str]:
    """This script in a process of its own, for one way."""
    options = ["--config", str(args.config), "--one", way, "--batches", str(batch)]
    for key in ("clients", "nodes", "steps", "rounds"):
        options += [f"--{key}", str(getattr(args, key))]
    options += [text for value in args.overrides for text in ("--set", value)]
    options += [] if share is None else ["--share", str(share)]
    paths = os.pathsep.join(
        [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )  # Ray's workers need both
    command = [sys.executable, "-W", "ignore", __file__, *options]
    environment = {**QUIET, **os.environ, "PYTHONPATH": paths}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def one(args: argparse.Namespace) -> list[dict[str, float]]:
    """Run one way here: its timed rounds, each with seconds, examples and loss."""
    from fedlab.config import RunConfig

    settings = [
        f"run.rounds={args.rounds + 1}",
        f"run.nodes={args.nodes}",
        f"data.clients={args.clients}",
        "data.partition={kind='iid'}",
        "data.min_client_size=2",
        "strategy.name=ffa",
        f"train.steps={args.steps}",
        f"train.batch_size={args.batches[0]}",
        "train.schedule=constant",
        "privacy={unit='example', sigma=1.0, clip=1.0}",
        "evaluate={every=1000, clients='never'}",
        *SETTINGS.get(args.one, []),
        *args.overrides,
    ]
    config = RunConfig.load(args.config, settings)
    if args.one == "bare":
        return bare(args, config)
    if args.one.startswith("flower"):
        from plain_flower import run

        return run(config, keep=args.one == "flower kept")[1:]
    import fedlab

    with tempfile.TemporaryDirectory() as folder:
        found = fedlab.simulate(config, Path(folder) / "run", quiet=True)
        rounds = metrics(found.path, "train")[1:]
    expected = float(args.steps * args.batches[0] * args.clients)  # what was drawn stays with the clients
    return [{"seconds": line["seconds"] - line["evaluate_seconds"], "examples": expected} for line in rounds]


def bare(args: argparse.Namespace, config: Any) -> list[dict[str, float]]:
    """The floor: ``nodes`` processes at once, each with its share of the clients' examples; a round takes as long as
    the slowest.
    """
    if args.share is None:
        processes = [start(args, "bare", args.batches[0], share) for share in range(args.nodes)]
        outputs = [process.communicate() for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit(outputs[0][1][-3000:])
        shares = [json.loads(output.strip().splitlines()[-1]) for output, _ in outputs]
        together = [list(parts) for parts in zip(*shares, strict=True)]
        return [
            {"seconds": max(p["seconds"] for p in parts), "examples": sum(p["examples"] for p in parts)}
            for parts in together
        ]
    import cohort

    from fedlab.models.adapters import initial_state
    from fedlab.session import open_session, torch_threads

    session = open_session(config.to_toml())
    own = session.data.clients[args.share :: args.nodes]
    state = initial_state(session.model, config.lora, 0)
    names = [name for name in state if name.endswith(".lora_B") or name.startswith("head.")]
    rounds = []
    with torch_threads(1):
        for _ in range(args.rounds + 1):
            started = time.perf_counter()
            cohort.bare(session, state, names, own)
            rounds.append(
                {"seconds": time.perf_counter() - started, "examples": float(args.steps * args.batches[0] * len(own))}
            )
    return rounds[1:]


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Median and half the range of the seconds of each way, and the ratios of medians."""
    seconds = {way: [r["seconds"] for r in found] for way, found in rounds.items() if found}
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    ways = {
        way: {
            "median": medians[way],
            "spread": half_range(v),
            "rounds": v,
            "examples": rounds[way][0]["examples"],
        }
        for way, v in seconds.items()
    }
    return {
        "ways": ways,
        "ratios": {f"{a} / {b}": medians[a] / medians[b] for a, b in RATIOS if a in medians and b in medians},
    }


def table(batch: int, args: argparse.Namespace, result: dict[str, Any]) -> str:
    """Markdown of one batch size."""
    lines = [f"\nbatch {batch}, {args.clients} clients per round, {args.steps} steps, {args.nodes} processes\n"]
    lines.append(header("way", "seconds per round", "examples per second"))
    for way, figures in result["ways"].items():
        seconds = f"{figures['median']:.2f} ± {figures['spread']:.2f}"
        lines.append(line(way, seconds, f"{figures['examples'] / figures['median']:.0f}"))
    return "\n".join([*lines, "", ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items())])


if __name__ == "__main__":
    main()
