"""How much memory a shared pass takes, before it is made, and how many clients fit into it.

Three parts grow with three things: the base (once), a row of the pass (what autograd keeps of one text of full length,
and its per-example gradients), and a client (its tensors, sums and moments). The rows of a pass are
``train.physical_batch`` however many clients share it, so what the limit decides is the number of clients.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.data.collate import probe_batch
from fedlab.errors import ConfigError
from fedlab.lora.state import BASIS, State, part_of
from fedlab.models.blocks import find_blocks
from fedlab.models.loaded import PEFT_PREFIX
from fedlab.session import Session
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
    """Bytes on one node."""

    base: int
    row: int
    rows: int
    client: int
    clients: int  # that may share a pass
    limit: int

    @property
    def total(self) -> int:
        """Of a pass of ``clients``."""
        return self.base + OVERHEAD + int(SLACK * (self.rows * self.row + self.clients * self.client))

    def __str__(self) -> str:
        return (
            f"memory per node: base {self.base / GB:.2f} GB, {self.rows} rows of {self.row / 1e6:.1f} MB,"
            f" {self.clients} clients per pass of {self.client / 1e6:.1f} MB: {self.total / GB:.2f} of"
            f" {self.limit / GB:.2f} GB"
        )


def plan_memory(session: Session, state: State, trained: Iterable[str], clients: int) -> MemoryPlan:
    """The plan for up to ``clients`` that share a pass, as many as fit.

    The limit is ``run.memory``, or else 90 % of what is free, shared by the nodes. Raises ConfigError if not even one
    fits.
    """
    config, model, names = session.config, session.model, sorted(trained)
    base = sum(t.nbytes for t in [*model.module.parameters(), *model.module.buffers()])
    numbers = sum(state[name].numel() for name in names)
    moments = 2 if config.train.optimizer == "adamw" else int(config.train.momentum > 0)
    # start, values, gradients and moments in float32, sums in float64
    client = numbers * (4 * (3 + moments) + 8)
    row = _activations(session, state, names) + 4 * numbers * (
        1 + (clients > 1)
    )  # gradients, and the tensors of the row's own client
    rows = config.train.physical_batch
    limit = int(config.run.memory * GB) if config.run.memory is not None else _free(config, model.device) + base
    fit = int(((limit - base - OVERHEAD) / SLACK - rows * row) // client)
    plan = MemoryPlan(base, row, rows, client, max(1, min(clients, fit)), limit)
    if fit < 1:
        raise ConfigError(
            f"one client needs {plan.total / GB:.2f} GB in a pass of train.physical_batch = {rows} rows, but a node has"
            f" {limit / GB:.2f} GB{' (run.memory)' if config.run.memory is not None else ''}; lower"
            " train.physical_batch or data.max_length"
            + ("" if config.run.checkpointing else f", or set {CHECKPOINTING} = true")
        )
    return plan


def _activations(session: Session, state: State, names: list[str]) -> int:
    """Bytes that autograd keeps of one text of ``data.max_length`` tokens, by a trial."""
    config, model = session.config, session.model
    kept: dict[int, int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in [*model.module.parameters(), *model.module.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    limits = (config.data.max_length, getattr(model.module.config, "max_position_embeddings", config.data.max_length))
    length = min(config.data.max_length, max(1, limits[1] - 2))  # some models count positions from beyond the padding
    batch = probe_batch(model.tokenizer, model.objective, ROWS, length)
    model.load(state)
    parts = {n: state[n][None].to(model.device) for n in state if n in names or ".lora_" in n}
    parts |= {n: state[n].to(model.device) for n in state if part_of(n) == BASIS}
    frozen |= {value.untyped_storage().data_ptr() for value in parts.values()}
    with CohortLayers(model, parts, names, config.lora.dropout) as layers:
        layers.rows.owner = torch.zeros(ROWS, dtype=torch.long, device=model.device)
        layers.rows.masks.keys = torch.zeros(ROWS, dtype=torch.int32, device=model.device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.objective.per_example_loss(model, batch).sum().backward()
        layers.take()
    whole = sum(kept.values()) // ROWS
    if not config.run.checkpointing:
        return whole
    blocks, lowest = find_blocks(model.module, [PEFT_PREFIX + n for n in model.scale], CHECKPOINTING)
    count = len(blocks) - lowest
    width: int = getattr(model.module.config, "hidden_size", 0)
    between = length * width * next(model.module.parameters()).element_size()
    return int(whole // count + count * between)


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
