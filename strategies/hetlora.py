"""HetLoRA (arXiv 2401.06432): clients of different ranks; their factors are padded with zeros, *both* of them, and
averaged.

A client starts from the first r_k directions. Weights follow ‖B_k·A_k‖_F of what a client sends (noised, if it adds
noise), so that a client that learned much counts more; ``norm_weights = false`` keeps the usual ones. With ``prune`` =
γ a client whose last directions, those beyond γ·r_k, carry less after training than before loses them for good. Both
look at uploads only and cost no privacy. The paper adds a penalty on these directions to the local loss; clients here
train the plain loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from fedlab.lora.average import weighted_mean
from fedlab.lora.ranks import frobenius_norm, pad
from fedlab.lora.state import State, local_pairs, modules, select
from fedlab.seeds import client_order
from strategies.base import Round, ServerState, Strategy, Updates, Weights
from strategies.options import NoOptions

PRUNED = "rank/"  # before a client's name in the server's state


class HetLoraOptions(NoOptions):
    """Own keys of ``[strategy]`` with ``name = "hetlora"``."""

    norm_weights: bool = Field(default=True, description="weigh clients by ‖B·A‖_F of what they send")
    prune: float | None = Field(
        default=None, gt=0, lt=1, description="γ: share of its rank that a client keeps when it is pruned"
    )
    min_rank: int = Field(default=1, gt=0, description="rank below which no client is pruned")


class HetLora(Strategy):
    """A_t+1 = Σ p_k pad(A_k), B_t+1 = Σ p_k pad(B_k), p_k ∝ ‖B_k·A_k‖_F."""

    effective: ClassVar[str] = "product of means of the padded factors"
    linear: ClassVar[bool] = False
    ranks: ClassVar[str] = "zero-padded factors"
    Options: ClassVar[type[HetLoraOptions]] = HetLoraOptions
    options: HetLoraOptions

    def aggregate(
        self, state: State, server_state: ServerState, updates: Updates, weights: Weights, round: Round
    ) -> tuple[State, ServerState]:
        """Padded mean of the factors; the head keeps the usual weights."""
        clients = sorted(updates, key=client_order)
        held = {client: local_factors(state, updates[client]) for client in clients}
        shares = norm_weights(held, weights) if self.options.norm_weights else weights
        padded: dict[str, State] = {client: {} for client in clients}
        for module in modules(state):
            B, A = f"{module}.lora_B", f"{module}.lora_A"
            for client in clients:
                padded[client][B], padded[client][A] = pad(held[client][B], held[client][A], len(state[A]))
        head = weighted_mean({client: select(updates[client], {"head"}) for client in clients}, weights)
        if self.options.prune is not None:
            server_state = self._pruned(state, server_state, held, self.options.prune)
        factors = {name: value.float() for name, value in weighted_mean(padded, shares).items()}
        after = {name: state[name] + head[name] if name in head else factors.get(name, state[name]) for name in state}
        return after, server_state

    def client_ranks(self, server_state: ServerState) -> dict[str, int]:
        """What pruning has left: ``rank/<client>`` of the server's state."""
        return {name.removeprefix(PRUNED): int(rank) for name, rank in server_state.items()}

    def _pruned(self, state: State, server_state: ServerState, held: Mapping[str, State], share: float) -> ServerState:
        """The server's state with the lowered ranks of clients whose tail shrank in this round."""
        lowered = dict(server_state)
        for client, after in held.items():
            rank = max(len(after[f"{module}.lora_A"]) for module in modules(state))
            cut = max(self.options.min_rank, math.ceil(share * rank))
            if cut < rank and tail_norm(after, cut, rank) < tail_norm(state, cut, rank):
                lowered[PRUNED + client] = torch.tensor(cut)
        return lowered


def local_factors(state: State, update: State) -> State:
    """What one client ended with: its own factors of every module, float64, at its own rank."""
    result: State = {}
    for module in modules(state):
        ((result[f"{module}.lora_B"], result[f"{module}.lora_A"]),) = local_pairs(state, {"": update}, module)
    return result


def norm_weights(held: Mapping[str, State], weights: Mapping[str, float]) -> Mapping[str, float]:
    """Weights ∝ ‖ΔW_k‖_F over all modules; the given ones if every product is zero."""
    norms = {
        c: math.hypot(*(frobenius_norm(own[f"{m}.lora_B"], own[f"{m}.lora_A"]) for m in modules(own)))
        for c, own in held.items()
    }
    total = math.fsum(norms.values())
    return {c: norm / total for c, norm in norms.items()} if total > 0 else weights


def tail_norm(factors: State, first: int, last: int) -> float:
    """‖B_tail·A_tail‖_F over all modules, of directions ``first`` to ``last``."""
    norms = (
        frobenius_norm(factors[f"{m}.lora_B"][:, first:last], factors[f"{m}.lora_A"][first:last])
        for m in modules(factors)
    )
    return math.hypot(*norms)
