"""On a GPU: a shared pass, hooks, and the CPU give one update; a bfloat16 base stays within its rounding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import gpu
import pytest
import torch

from fedlab.config import RunConfig
from fedlab.lora.state import State
from fedlab.models.adapters import initial_state
from fedlab.models.loaded import LoadedModel
from fedlab.models.loading import adapt
from fedlab.objectives import Classification
from fedlab.privacy.plan import DPPlan
from fedlab.train.cohort import train_cohort
from fedlab.train.local import LocalTraining, Trained
from fedlab.train.trainer import train_client

pytestmark = pytest.mark.gpu

LENGTH, ROWS, CLIENTS = 24, 24, 3
CONFIG = """
[run]
rounds = 1
[lora]
rank = 4
alpha = 4
target_modules = {targets}
[train]
lr = 0.1
steps = 2
batch_size = 8
physical_batch = 8
"""


def loaded(name: str, device: str, dtype: torch.dtype) -> tuple[LoadedModel, RunConfig, State]:
    torch.manual_seed(0)
    base, head, targets = gpu.MODELS[name](True)
    config = RunConfig.parse(CONFIG.format(targets=str(targets).replace("'", '"')))
    objective = Classification(tuple(map(str, range(gpu.LABELS))))
    tokenizer = cast(Any, SimpleNamespace(pad_token_id=1))
    model = adapt(base.to(dtype), head, tokenizer, config.lora, name, torch.device(device), objective)
    g = torch.Generator().manual_seed(1)
    start = initial_state(model, config.lora, 0)
    return model, config, {n: v + 0.1 * torch.randn(v.shape, generator=g) for n, v in start.items()}


def updates(name: str, device: str, way: str, dtype: torch.dtype = torch.float32) -> dict[str, Trained]:
    """Two private steps of every client, ``way`` = "cohort" or "hooks"."""
    model, config, state = loaded(name, device, dtype)
    clients, data = gpu.texts(CLIENTS, ROWS, LENGTH)
    names = sorted(n for n in state if n.endswith("lora_B") or n.startswith("head."))

    def plan(client: str) -> DPPlan:
        return DPPlan(data.size(client), data.size(client), 2, 1.0, 0.3, 1e-5, 1, "seeded")

    if way == "cohort":
        members = [LocalTraining(c, state, plan(c)) for c in clients]
        found = train_cohort(model, data, members, names, config, 1)
        assert all(isinstance(t, Trained) for t in found.values())
        return cast(dict[str, Trained], found)
    return {c: train_client(model, data, c, state, names, config, 1, plan(c)) for c in clients}


def distance(mine: Trained, other: Trained) -> float:
    """Norm of the difference of two updates over the norm of the second."""
    total = sum(float(v.double().square().sum()) for v in other.update.values())
    gap = sum(float((mine.update[n].double() - v.double()).square().sum()) for n, v in other.update.items())
    return (gap / total) ** 0.5


@pytest.mark.parametrize("name", ["roberta-large", "llama-1b"])
def test_one_update_by_every_way_and_on_every_device(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = updates(name, "cpu", "hooks")
    for way in ("cohort", "hooks"):
        found = updates(name, "cuda", way)
        for client, trained in found.items():
            assert distance(trained, reference[client]) < 1e-4


@pytest.mark.parametrize("name", ["roberta-large", "llama-1b"])
def test_bfloat16_base(name: str) -> None:
    reference = updates(name, "cpu", "hooks")
    for way in ("cohort", "hooks"):
        for client, trained in updates(name, "cuda", way, torch.bfloat16).items():
            assert all(bool(v.isfinite().all()) and v.dtype == torch.float32 for v in trained.update.values())
            assert distance(trained, reference[client]) < 0.05
