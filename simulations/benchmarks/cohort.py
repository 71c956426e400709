"""Many clients in one pass against one after the other, and against the floor: a bare loop without any framework.

    python simulations/benchmarks/cohort.py                       # 12 clients, batches of 4 and of 32, MiniLM
    python simulations/benchmarks/cohort.py --small               # seconds; what the test suite runs

All ways do the same work: the same model, clients, Poisson batches, clip and noise, B of every adapted layer and the
head.

- alone: ``train_client`` for each client, as with ``run.cohort = 1``;
- together: ``train_cohort`` for groups of ``--cohort`` clients;
- bare: joint LoRA steps over as many examples without DP and without clients, by stock peft and autograd: what a user
  who simulates
  nothing pays.

Each is timed in turn within one run, ``--repeats`` times, in processor seconds of one thread; printed are medians,
spread and ratios.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
from common import half_range, header, interleaved, line, parser, write_json

from fedlab.config import RunConfig
from fedlab.lora.state import State
from fedlab.models.adapters import initial_state
from fedlab.session import Session, open_session, torch_threads
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining
from fedlab.train.trainer import train_client

WAYS = ("alone", "together", "bare")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print; returns batch size → medians and ratios."""
    options = parser(__doc__, "quickstart.toml")
    options.add_argument("--clients", type=int, default=12)
    options.add_argument("--cohort", type=int, help="clients per pass (default: all)")
    options.add_argument("--batches", type=int, nargs="+", default=[4, 32])
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--small", action="store_true", help="3 clients, one repeat")
    args = options.parse_args(arguments)
    if args.small:
        args.clients, args.batches, args.steps, args.repeats = 3, [4], 1, 1
    results: dict[str, dict[str, float]] = {}
    print(header("batch", "alone s", "together s", "bare s", "alone / together", "together / bare"), flush=True)
    for batch in args.batches:
        run = [
            f"data.clients={args.clients}",
            f"train.batch_size={batch}",
            f"train.steps={args.steps}",
            "data.min_client_size=2",
        ]
        session = open_session(RunConfig.load(args.config, [*args.overrides, *run]).to_toml())
        with torch_threads(1):
            seconds = measure(session, args.cohort or args.clients, args.repeats)
        median = {way: statistics.median(seconds[way]) for way in WAYS}
        spread = {way: half_range(seconds[way]) for way in WAYS}
        ratios = {
            "alone / together": median["alone"] / median["together"],
            "together / bare": median["together"] / median["bare"],
        }
        results[str(batch)] = {**median, **{f"{way} spread": spread[way] for way in WAYS}, **ratios}
        times = (f"{median[way]:.2f} ± {spread[way]:.2f}" for way in WAYS)
        print(line(batch, *times, *(f"{ratio:.2f}" for ratio in ratios.values())), flush=True)
    write_json(args.json, {"arguments": vars(args) | {"json": None}, "results": results})
    return results


def measure(session: Session, cohort: int, repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each way, interleaved, after one round that is not counted."""
    config, model, data = session.config, session.model, session.data
    state = initial_state(model, config.lora, 0)
    names = [name for name in state if name.endswith(".lora_B") or name.startswith("head.")]
    members = [LocalTraining(client, state, session.plan(client)) for client in data.clients]
    ways: dict[str, Callable[[], object]] = {
        "alone": lambda: [train_client(model, data, m.client, m.state, names, config, 1, m.plan) for m in members],
        "together": lambda: [
            train_cohort(model, data, members[i : i + cohort], names, config, 1) for i in range(0, len(members), cohort)
        ],
        "bare": lambda: bare(session, state, names, data.clients),
    }
    return interleaved(ways, repeats)


def bare(session: Session, state: State, names: list[str], clients: list[str]) -> None:
    """The same number of examples per step, drawn at random, sorted by length, in chunks of the same size: plain SGD,
    no DP.
    """
    config, model, data = session.config, session.model, session.data
    model.load(state)
    everyone = np.concatenate([data.train(client) for client in clients])
    rng, size = np.random.default_rng(0), config.train.physical_batch
    parameters = [model.parameters[name].requires_grad_() for name in names]
    for _ in range(config.train.steps or 1):
        rows = rng.choice(everyone, config.train.batch_size * len(clients))
        rows = rows[np.argsort(data.tokens.lengths(rows), kind="stable")]
        for i in range(0, len(rows), size):
            batch = data.batch(rows[i : i + size], model.tokenizer.pad_token_id)
            (model.objective.per_example_loss(model, batch).sum() / len(rows)).backward()
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter -= config.train.lr * parameter.grad
                parameter.grad = None
    model.module.requires_grad_(False)


if __name__ == "__main__":
    main()
