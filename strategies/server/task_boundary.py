"""The end of a task of a stream on the server: what it leaves to the next.

At the end of a task, after its last round: every task's texts are scored (a row of the matrix of scores), what was
learnt is merged, the inputs that were used are protected (a release of their own, ``clients.gram``), and
``memory.safetensors`` and ``task.json`` are written. The sums that clients released are kept first, so that nothing is
released again if the run is cut off in between.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.continual.metrics import worst_share
from fedlab.continual.subspace import complement, leak
from fedlab.errors import ConfigError
from fedlab.evaluate import higher_is_better, primary_name, primary_score
from fedlab.lora.state import BASIS, State, modules, nbytes, outer_b, part_of, write_state
from fedlab.session import Session, torch_threads
from strategies.server.gram_release import GramRelease, collect_grams
from strategies.server.loop import Rounds
from strategies.server.task_start import MEMORY, first_state
from strategies.stream import PROTECTED

TASK = "task.json"


def end_stage(rounds: Rounds, status: str) -> None:
    """Score, protect, write. Does nothing outside a stream, or where it was done before the run was cut off.

    If the budget ended the task, no further release is asked for: no task follows.
    """
    config, stage = rounds.config, rounds.config.stage
    if stage is None or all((rounds.directory.path / name).is_file() for name in (MEMORY, TASK)):
        return
    rounds.progress.note("scoring every task")
    scores = score_tasks(rounds.session, rounds.state, config)
    if stage.task == 0 and not rounds.session.model.objective.groups:  # what forward transfer is measured from
        start, _ = first_state(config, rounds.strategy, rounds.session)
        scores["before"] = score_tasks(rounds.session, start, config)["pooled"]
    started = time.perf_counter()
    last = stage.task == len(config.tasks) - 1 or config.stream.joint or status == "budget-exhausted"
    grams = {} if last or not rounds.strategy.reads_inputs else _grams(rounds)
    with torch_threads(1):
        memory = rounds.strategy.end_task(rounds.state, rounds.memory, grams)
    write_state(rounds.directory.path / MEMORY, memory)
    rows = {
        name.removesuffix(f".{PROTECTED}"): value for name, value in memory.items() if name.endswith(f".{PROTECTED}")
    }
    rounds.directory.write_json(
        TASK,
        {
            "task": stage.task,
            "name": config.tasks[stage.task].name,
            **scores,
            "leak": orthogonality(rounds.state, rounds.memory),
            "protected": {module: [len(value), value.shape[1]] for module, value in rows.items()},
            "bytes_basis": nbytes({n: v for n, v in rounds.state.items() if part_of(n) in rounds.strategy.static}),
            "boundary_seconds": round(time.perf_counter() - started, 3),
        },
    )


def _grams(rounds: Rounds) -> dict[str, Tensor]:
    """module → the sum of its inputs' Gram matrices over clients, which is released now; its traffic is added up."""
    if rounds.config.gram is None:
        raise ConfigError("strategy.gram is not in the configuration: start the run with fedlab simulate")
    rounds.progress.note("learning which inputs the task used")
    release = GramRelease(
        rounds.grid,
        rounds.config,
        rounds.config.gram,
        rounds.federation,
        rounds.accounts,
        rounds.strategy.travelling(rounds.state),
    )
    grams, traffic = collect_grams(release, rounds.directory.path, rounds.session.model)
    for name, count in traffic.items():
        rounds.totals[name] += count
    return grams


def score_tasks(session: Session, state: State, config: RunConfig) -> dict[str, Any]:
    """Primary score on every task's held-out texts, pooled and per client; NaN for tasks whose head was not trained
    yet.
    """
    assert config.stage is not None
    own_heads = bool(session.model.objective.groups)
    pooled: list[float] = []
    clients: list[dict[str, float]] = []
    with torch_threads(os.cpu_count() or 1):
        session.model.load(state)
        for task in range(len(config.tasks)):
            if task > config.stage.task and own_heads and not config.stream.joint:
                pooled.append(math.nan)
                clients.append({})
                continue
            data = session.data.at(task)
            pooled.append(primary_score(session.model, data, data.test, config))
            each = config.evaluate.clients != "never"
            clients.append(
                {c: primary_score(session.model, data, data.local_test(c), config) for c in data.clients}
                if each
                else {}
            )
    higher = higher_is_better(config)
    spread = [
        {"mean": float(np.nanmean(list(own.values()))), "worst_tenth": worst_share(own.values(), higher)} if own else {}
        for own in clients
    ]
    return {"primary": primary_name(config), "pooled": pooled, "clients": clients, "spread": spread}


def orthogonality(state: State, memory: Mapping[str, Tensor]) -> float | None:
    """Largest share of any layer's change of this task inside what was protected from it; None where nothing was."""
    found = []
    for module in modules(state):
        delta = outer_b(state, module) @ state[f"{module}.lora_A"]
        if (rows := memory.get(f"{module}.{PROTECTED}")) is not None:
            found.append(leak(delta, None, rows))
        elif (basis := state.get(f"{module}.{BASIS}")) is not None:
            found.append(leak(delta, complement(basis), complement(state[f"{module}.lora_A"])))
    return max(found) if found else None
