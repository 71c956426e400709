"""Reference models of membership inference: trained like one client, on given records, without noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fedlab.config import RunConfig
from fedlab.config.data import ClientsSection
from fedlab.data.partition import Shards
from fedlab.lora.state import State
from fedlab.privacy.plan import DPPlan
from fedlab.session import Session
from fedlab.train.trainer import train_client

QUIET = 1e-9  # noise multiplier of a plan whose clip matters and whose noise is not to
NONE = np.array([], dtype=np.int64)


def train_reference(
    session: Session, start: State, positions: np.ndarray, trained: Callable[[int], Sequence[str]], number: int
) -> State:
    """A model trained on the records at ``positions`` for as many rounds and steps as a client of the run.

    With the run's clip, since its learning rate was chosen for that. Nothing of it leaves: it is made from the data of
    who simulates, and dropped. ``number`` names its random choices.
    """
    config, name = session.config, f"reference-{number}"
    data = replace(session.data, shards=Shards({name: positions}, {name: NONE}, NONE), _fingerprints={})
    plain = config.model_copy(update={"clients": ClientsSection()})
    plan = _plan(config, len(positions))
    state = dict(start)
    for turn in range(1, config.run.rounds + 1):
        names = [n for n in trained(turn) if n in start]
        update = train_client(session.model, data, name, state, names, plain, turn, plan).update
        state |= {n: state[n] + change for n, change in update.items()}
    return state


def _plan(config: RunConfig, records: int) -> DPPlan | None:
    privacy, train = config.privacy, config.train
    if privacy.unit != "example" or privacy.clip is None:
        return None
    size = min(train.batch_size, records)
    return DPPlan(records, size, train.local_steps(records), QUIET, privacy.clip, 0.5, config.run.rounds, "seeded")
