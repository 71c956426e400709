"""Updates that are finite and yet useless: their norm is far outside the round's.

A client whose training diverged to large numbers, not to NaN, would take the mean with it, and in the next round all
others diverge. Norms of honest clients differ by their sizes, steps and learning rates, by far less than the default of
``run.outlier``; nothing changes for a round without an outlier. This is no defence against a client that means harm:
one can stay below any such limit (``strategy.robust`` is for that).
"""

from __future__ import annotations

import math
import statistics

from fedlab.lora.state import State
from strategies.server.outcome import UNUSABLE, TrainOutcome

FEWEST = 3  # updates of which a median says something


def set_outliers_aside(outcome: TrainOutcome, factor: float) -> None:
    """Note every update's norm in its metrics, and exclude those beyond ``factor`` times the median (0: none)."""
    norms = {client: norm(update) for client, update in outcome.updates.items()}
    for client, value in norms.items():
        outcome.metrics[client]["norm"] = value
    if not factor or len(norms) < FEWEST:
        return
    limit = factor * (median := statistics.median(norms.values()))
    for client, value in norms.items():
        if 0 < limit < value:
            outcome.excluded[client] = (
                f"{UNUSABLE}: its norm, {value:.3g}, is {value / median:.3g} times the round's median; run.outlier ="
                f" {factor:g} allows no more. It diverged: lower its learning rate (train.lr, clients.lr)"
            )
            del outcome.updates[client], outcome.metrics[client]


def norm(update: State) -> float:
    """L2 norm of all tensors together, float64."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in update.values()))
