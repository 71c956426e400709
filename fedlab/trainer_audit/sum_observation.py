"""What ``observation.observe`` sees under shared noise: what the server sees, a sum of the audited client's real share
and those of the fewest honest clients beside it.

The audited client's clipped sum comes from the real ``sum_client`` and its share from the real plan; the other honest
ones sum nothing and add their shares. With as many of them as the claim rests on, the decoded sum is Σ clipped + noise,
and the noise must have what is accounted for: too little in a share shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.data import FederatedData
from fedlab.models.loaded import LoadedModel
from fedlab.privacy.plan import DPPlan
from fedlab.train import sums  # by module: what is run is whatever the module holds now
from fedlab.train.dp import PerExampleGradients
from fedlab.train.local import LocalTraining, Summed
from fedlab.trainer_audit.subject import PREFIX, Log, Observation, RecordedPlan, Subject

ROUNDS = 1000  # a plan of several steps is as many rounds of one; their numbers are apart from other rounds'


def observe_sum(
    who: Subject,
    data: FederatedData,
    plan: RecordedPlan,
    client: str,
    round_number: int,
    config: RunConfig,
    factory: Callable[[LoadedModel, Iterable[str]], PerExampleGradients],
) -> Observation:
    """Rounds of one step each, as many as ``plan`` has. Released is the decoded sum of all of them."""
    log, single = plan.log, plan.of_steps(1)
    total = {name: torch.zeros(who.state[name].shape, dtype=torch.float64) for name in who.names}
    for step in range(plan.rounds):
        number = round_number * ROUNDS + step
        training = LocalTraining(client, who.state, single)
        found = sums.sum_client(who.model, data, training, who.names, config, number, factory)
        released = _summed(who, found, single, config, client, number)
        log.positions.append(np.concatenate([np.array([], dtype=np.int64), *log.forwards]))
        log.forwards.clear()
        _record(log, who, released, found.sums)
        total = {name: total[name] + released[name] for name in who.names}
    log.private = {name: value / plan.normaliser for name, value in total.items()}
    # decoding is exact but for the grid: √d steps of C/2^bits, which is what this learning rate says of rounding
    return Observation(total, {name: value.float() for name, value in total.items()}, _rate(plan), plan, log)


def _rate(plan: RecordedPlan) -> float:
    assert plan.shared is not None
    return plan.normaliser / (plan.shared.grid(plan.clip) * 2.0**22)


def _summed(
    who: Subject, found: Summed, plan: DPPlan, config: RunConfig, client: str, number: int
) -> dict[str, Tensor]:
    """The decoded sum of the client's share and those of the other honest clients that the claim rests on."""
    assert plan.shared is not None
    dimension = int(who.sizes.sum())
    nothing = replace(found, sums={name: torch.zeros_like(value) for name, value in found.sums.items()})
    total = sums.noised_share(found, plan, dimension, config, client, number)
    other = DPPlan(**{name: getattr(plan, name) for name in DPPlan.__dataclass_fields__})  # writes nothing down
    for i in range(1, plan.shared.honest):
        more = sums.noised_share(nothing, other, dimension, config, f"{client} beside {i}", number)
        total = {name: value + more[name] for name, value in total.items()}
    return {name: torch.from_numpy(plan.shared.decode(value, plan.clip)) for name, value in total.items()}


def _record(log: Log, who: Subject, released: dict[str, Tensor], clipped: dict[str, Tensor]) -> None:
    """Write down a round's sum, and the noise in it."""
    log.released.append(np.concatenate([released[name].flatten()[:PREFIX].numpy() for name in who.names]))
    noise = {name: (released[name] - clipped[name]).flatten() for name in who.names}
    for name, value in noise.items():
        log.squares[name] = log.squares.get(name, 0.0) + float(value.square().sum())
        log.elements[name] = log.elements.get(name, 0) + value.numel()
    log.heads.append(np.concatenate([noise[name][:PREFIX].numpy() for name in who.names]))
