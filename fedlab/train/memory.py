"""How much memory a shared pass takes, before it is made, how many clients fit into it, and how long a round trains.

Three parts grow with three things: the base (once), a row of the pass (what autograd keeps of one text of full length,
and its per-example gradients), and a client (its tensors, sums and moments). The rows of a pass are
``train.physical_batch`` however many clients share it, so what the limit decides is the number of clients. Logits over
a vocabulary are made in chunks of bounded size, once. Time is that of one measured pass, times the texts of a round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.data.collate import probe_batch
from fedlab.errors import ConfigError
from fedlab.lora.state import BASIS, State, part_of
from fedlab.models.blocks import blocks_in_gradient, checkpointed
from fedlab.models.loaded import PEFT_PREFIX
from fedlab.models.quantised import parts_of, stored
from fedlab.objectives.base import Batch
from fedlab.session import Session, torch_threads
from fedlab.train.cohort import CHECKPOINTING
from fedlab.train.fused import CohortLayers

GB = 10**9
ROWS = 2  # of the trial pass
# short-lived tensors and what the allocator holds back: peak memory grows 1.6 times as fast as what autograd keeps
SLACK = 1.6
OVERHEAD = 150 * 10**6  # what the libraries' own buffers take in a first pass
SHARE = 0.9  # of the free memory that is used if nothing else is said


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one node, and seconds."""

    base: int
    row: int
    rows: int
    client: int
    clients: int  # that may share a pass
    limit: int
    loss: int = 0  # of logits that are alive at once
    seconds: float = 0.0  # of training in a round of all nodes, at about the speed of one measured pass

    @property
    def total(self) -> int:
        """Of a pass of ``clients``."""
        return self.base + OVERHEAD + self.loss + int(SLACK * (self.rows * self.row + self.clients * self.client))

    def __str__(self) -> str:
        return (
            f"memory per node: base {self.base / GB:.2f} GB, {self.rows} rows of {self.row / 1e6:.1f} MB,"
            f"{f' logits of {self.loss / 1e6:.0f} MB,' if self.loss else ''}"
            f" {self.clients} clients per pass of {self.client / 1e6:.1f} MB: {self.total / GB:.2f} of"
            f" {self.limit / GB:.2f} GB; training takes about {_shown(self.seconds)} per round"
        )


def plan_memory(session: Session, state: State, trained: Iterable[str], clients: int) -> MemoryPlan:
    """The plan for up to ``clients`` that share a pass, as many as fit.

    The limit is ``run.memory``, or else 90 % of what is free, shared by the nodes. Raises ConfigError if not even one
    fits.
    """
    config, model, names = session.config, session.model, sorted(trained)
    base = sum(stored(t) for t in [*model.module.parameters(), *model.module.buffers()])
    numbers = sum(state[name].numel() for name in names)
    moments = 2 if config.train.optimizer == "adamw" else int(config.train.momentum > 0)
    # start, values, gradients and moments in float32, sums in float64
    client = numbers * (4 * (3 + moments) + 8)
    trial = _trial(session, state, names)
    # gradients, and the tensors of the row's own client
    row = trial.kept + 4 * numbers * (1 + (clients > 1))
    rows = config.train.physical_batch
    loss = model.objective.loss_bytes(model, rows * trial.length)
    limit = int(config.run.memory * GB) if config.run.memory is not None else _free(config, model.device) + base
    fit = int(((limit - base - OVERHEAD - loss) / SLACK - rows * row) // client)
    seconds = trial.seconds * _tokens_per_round(session) / trial.length / _at_once(config, model.device)
    plan = MemoryPlan(base, row, rows, client, max(1, min(clients, fit)), limit, loss, seconds)
    if fit < 1:
        raise ConfigError(
            f"one client needs {plan.total / GB:.2f} GB in a pass of train.physical_batch = {rows} rows, but a node has"
            f" {limit / GB:.2f} GB{' (run.memory)' if config.run.memory is not None else ''}; lower"
            " train.physical_batch or data.max_length"
            + ("" if config.run.checkpointing else f", or set {CHECKPOINTING} = true")
        )
    return plan


@dataclass(frozen=True)
class _Trial:
    """What a pass over made-up texts told, per text.

    Args:
        kept: bytes that autograd keeps of a text of ``length`` tokens.
        length: ``data.max_length``, or what the model has positions for.
        seconds: of the way forth and back.
    """

    kept: int
    length: int
    seconds: float


def _trial(session: Session, state: State, names: list[str]) -> _Trial:
    config, model = session.config, session.model
    limits = (config.data.max_length, getattr(model.module.config, "max_position_embeddings", config.data.max_length))
    length = min(config.data.max_length, max(1, limits[1] - 2))  # some models count positions from beyond the padding
    batch = probe_batch(model.tokenizer, model.objective, ROWS, length)
    model.load(state)
    parts = {n: state[n][None].to(model.device) for n in state if n in names or ".lora_" in n}
    parts |= {n: state[n].to(model.device) for n in state if part_of(n) == BASIS}
    kept: dict[int, int] = {}
    with CohortLayers(model, parts, names, config.lora.dropout) as layers:
        layers.rows.owner = torch.zeros(ROWS, dtype=torch.long, device=model.device)
        layers.rows.masks.keys = torch.zeros(ROWS, dtype=torch.int32, device=model.device)
        with _counting(kept, [*model.module.parameters(), *model.module.buffers(), *parts.values()]):
            model.objective.per_example_loss(model, batch).sum().backward()
        layers.take()
        seconds = _timed(session, layers, batch) / ROWS
    whole = sum(kept.values()) // ROWS
    if config.run.checkpointing:
        count = len(blocks_in_gradient(model.module, [PEFT_PREFIX + n for n in model.scale], CHECKPOINTING))
        width: int = getattr(model.module.config, "hidden_size", 0)
        between = length * width * next(model.module.parameters()).element_size()
        whole = int(whole // count + count * between)
    return _Trial(whole, length, seconds)


@contextmanager
def _counting(kept: dict[int, int], frozen: Iterable[Tensor]) -> Iterator[None]:
    """While open, ``kept`` gets what autograd keeps beside ``frozen``: where it lies → its bytes."""
    known = {part.untyped_storage().data_ptr() for tensor in frozen for part in parts_of(tensor)}

    def keep(tensor: Tensor) -> Tensor:
        for storage in (part.untyped_storage() for part in parts_of(tensor)):
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _timed(session: Session, layers: CohortLayers, batch: Batch) -> float:
    """Seconds of a second pass, which finds everything ready."""
    config, model = session.config, session.model
    adapted = [PEFT_PREFIX + n for n in model.scale]
    blocks = blocks_in_gradient(model.module, adapted, CHECKPOINTING) if config.run.checkpointing else []
    with torch_threads(config.run.threads), checkpointed(blocks) if blocks else nullcontext():
        started = time.perf_counter()
        model.objective.per_example_loss(model, batch).sum().backward()
        layers.take()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - started


def _tokens_per_round(session: Session) -> float:
    """Tokens that the clients of a round train on, on average over clients; batches as they are expected."""
    config, data = session.config, session.data
    tokens, clients = 0.0, list(data.clients)
    for client in clients:
        plan, own = session.plan(client), data.train(client)
        steps = plan.steps if plan else config.train.local_steps(len(own))
        texts = steps * (plan.normaliser if plan else min(config.train.batch_size, len(own)))
        tokens += texts * float(np.mean(data.tokens.lengths(own))) if len(own) else 0.0
    return tokens * config.clients_per_round / max(1, len(clients))


def _at_once(config: RunConfig, device: torch.device) -> int:
    """Nodes that compute at the same time; those on one GPU take turns."""
    if device.type == "cuda":
        return 1
    return max(1, min(config.run.nodes, config.clients_per_round, (os.cpu_count() or 1) // config.run.threads))


def _shown(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _free(config: RunConfig, device: torch.device) -> int:
    """Bytes that one node may take beside the base."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0] * min(1.0, config.run.gpus_per_node or 1.0))
    return int(SHARE * _available() / config.run.nodes)


def _available() -> int:
    """Memory that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
