"""The audit's check of a shared pass: what a client releases from one must be what it releases when it trains alone.

The other checks look at ``train_client``. A run trains several clients in one pass (``fedlab.train.cohort``), so
whatever goes wrong there (a clip left out, another client's rows, weights or noise, a step too few) must show as a
difference between the two.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlab.errors import FedlabError
from fedlab.lora.state import State
from fedlab.seeds import torch_stream
from fedlab.train.cohort import supports_fused, train_cohort
from fedlab.train.local import LocalTraining
from fedlab.train.sums import sum_client, sum_clients
from fedlab.train.trainer import train_client
from fedlab.trainer_audit.observation import Subject

CLIENTS = 3
STEPS = 2
SPREAD = 0.1  # of the clients' weights around the received ones
TOLERANCE = 1e-3  # relative; float32 leaves 1e-6


def shared_pass(who: Subject) -> list[str]:
    """Sentences; empty where all is well, or where no two clients ever share a pass.

    Each client keeps its own plan (σ, clip, q) but for two steps and noise that can be repeated, and starts from
    weights of its own, so that another's in their place would show. Steps are small, so that rounding stays rounding.
    """
    session, config = who.session, who.config
    if config.shared_noise:
        return _shared_sums(who)
    others = [client for client in session.data.clients if client != who.client]
    if config.train.gradients != "fused" or not supports_fused(who.model, who.names):
        return []
    trainings = []
    for client in [who.client, *others[: CLIENTS - 1]]:
        plan = session.plan(client)
        assert plan is not None  # who.plan() would have raised
        draws = torch_stream(config.run.seed, "shared-pass", client)
        moved = {
            name: who.state[name] + SPREAD * torch.randn(who.state[name].shape, generator=draws) for name in who.names
        }
        trainings.append(LocalTraining(client, who.state | moved, replace(plan, steps=STEPS, noise="seeded")))
    lr = min(0.01 * t.plan.normaliser / t.plan.clip for t in trainings if t.plan)
    config = config.model_copy(update={"train": config.train.model_copy(update={"lr": lr})})
    found = train_cohort(who.model, session.data, trainings, who.names, config, 1)
    sentences = []
    for t in trainings:
        alone = train_client(who.model, session.data, t.client, t.state, who.names, config, 1, t.plan)
        mine = found[t.client]
        if isinstance(mine, FedlabError):
            sentences.append(f"{t.client} fails in a shared pass, and not alone: {mine}")
        elif (gap := _gap(mine.update, alone.update)) > TOLERANCE:
            sentences.append(
                f"{t.client} releases another update from a shared pass than alone (relative difference {gap:.2g})"
            )
        elif mine.steps != alone.steps:
            sentences.append(f"{t.client} takes {mine.steps} steps in a shared pass, {alone.steps} alone")
    return sentences


def _shared_sums(who: Subject) -> list[str]:
    """The same under shared noise: what a client adds to the sum, which all clients do at one state."""
    session, config = who.session, who.config
    if config.train.gradients != "fused" or not supports_fused(who.model, who.names):
        return []
    clients = [who.client, *(client for client in session.data.clients if client != who.client)][:CLIENTS]
    trainings = [LocalTraining(client, who.state, session.plan(client)) for client in clients]
    found = sum_clients(who.model, session.data, trainings, who.names, config, 1)
    sentences = []
    for t in trainings:
        alone = sum_client(who.model, session.data, t, who.names, config, 1)
        if (gap := _gap(found[t.client].sums, alone.sums)) > TOLERANCE:
            sentences.append(f"{t.client} adds another sum in a shared pass than alone (relative difference {gap:.2g})")
    return sentences


def _gap(mine: State, alone: State) -> float:
    """Largest relative difference of any tensor, so that a small one cannot hide behind a large one."""
    gaps = []
    for name, wanted in alone.items():
        difference = (mine[name] - wanted).double()
        gaps.append(float(difference.norm() / wanted.double().norm().clamp(min=torch.finfo(torch.float32).tiny)))
    return max(gaps)
