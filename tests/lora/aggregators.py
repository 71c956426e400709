"""LoRA aggregators that are right, written from the papers in a few lines.

The broken ones of ``broken.py`` are made from them.
"""

from __future__ import annotations

from typing import Any

import torch

from fedlab.lora import conformance

EXACT, FACTORS, BEST, FAIR = list(conformance.PROMISES)[:4]
B_ONLY = ("lora_B", "head")


def fedavg(state, updates, weights, round_number):
    """FedIT, FFA and RoLoRA: what is sent is averaged."""
    result = dict(state)
    for name in next(iter(updates.values())):
        mean = sum(weights[c] * updates[c][name].double() for c in sorted(updates))
        if not mean.isfinite().all():
            raise ValueError(f"{name} is not finite")
        result[name] = (state[name] + mean).float()
    return result


def modules(state) -> list[str]:
    return sorted(name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A"))


def ends(state, updates, module):
    """Sorted clients' own (B_k, A_k), each of its own rank."""
    pairs = []
    for _, update in sorted(updates.items()):
        B, A = state[f"{module}.lora_B"].double(), state[f"{module}.lora_A"].double()
        dB, dA = (
            update.get(f"{module}.lora_B", torch.zeros_like(B)),
            update.get(f"{module}.lora_A", torch.zeros_like(A)),
        )
        r = min(dB.shape[1], dA.shape[0])
        pairs.append((B[:, :r] + dB[:, :r], A[:r] + dA[:r]))
    return pairs


def shares(weights) -> list[float]:
    return [weights[c] for c in sorted(weights)]


def svd(matrix, rank=None):
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    keep = int((1e-12 * S[0] < S).sum()) if rank is None else rank
    return U[:, :keep], S[:keep], Vt[:keep]


def mean_product(state, updates, weights, module):
    return sum(p * B @ A for p, (B, A) in zip(shares(weights), ends(state, updates, module), strict=True))


def with_residual(after, before, module, matrix):
    """Add a dense m×n matrix to the residual of a module."""
    if f"{module}.residual_B" in before:
        matrix = matrix + before[f"{module}.residual_B"].double() @ before[f"{module}.residual_A"].double()
    U, S, Vt = svd(matrix)
    return after | {f"{module}.residual_B": (U * S).float(), f"{module}.residual_A": Vt.float()}


def fedex(state, updates, weights, round_number, add=with_residual, factor=1.0):
    after = fedavg(state, updates, weights, round_number)
    for module in modules(state):
        lost = mean_product(state, updates, weights, module)
        lost = lost - after[f"{module}.lora_B"].double() @ after[f"{module}.lora_A"].double()
        after = add(after, state, module, factor * lost)
    return after


def flora(state, updates, weights, round_number):
    after = fedavg(state, updates_of_head(updates), weights, round_number)
    for module in modules(state):
        after = with_residual(after, state, module, mean_product(state, updates, weights, module))
        after[f"{module}.lora_B"] = torch.zeros_like(state[f"{module}.lora_B"])
    return after


def updates_of_head(updates):
    return {c: {n: v for n, v in u.items() if n.startswith("head.")} for c, u in updates.items()}


def root_on_both(U, S, Vt):
    return U * S.sqrt(), S.sqrt()[:, None] * Vt


def flexlora(state, updates, weights, round_number, split=root_on_both, cut=svd):
    after = fedavg(state, updates_of_head(updates), weights, round_number)
    for module in modules(state):
        rank = len(state[f"{module}.lora_A"])
        mean = mean_product(state, updates, weights, module)
        if not mean.isfinite().all():
            raise ValueError(f"{module} is not finite")
        B, A = split(*cut(mean, rank))
        after[f"{module}.lora_B"], after[f"{module}.lora_A"] = B.float(), A.float()
    return after


def lora_fair(state, updates, weights, round_number):
    after = fedavg(state, updates, weights, round_number)
    for module in modules(state):
        A = after[f"{module}.lora_A"].double()
        B = mean_product(state, updates, weights, module) @ torch.linalg.pinv(A)
        after[f"{module}.lora_B"] = B.float()
    return after


def padded(state, updates, fill=0.0):
    """Every update in the shapes of the state."""
    result = {}
    for client, update in updates.items():
        result[client] = {n: torch.full_like(state[n], fill) for n in update}
        for name, value in update.items():
            result[client][name][tuple(map(slice, value.shape))] = value
    return result


def padded_changes(state, updates, weights, round_number):
    return fedavg(state, padded(state, updates), weights, round_number)


def hetlora(state, updates, weights, round_number):
    """Factors, not changes, padded with zeros: a direction that a client lacks is zero there."""
    full = padded(state, updates)
    for client, update in updates.items():
        for name, value in update.items():
            held = torch.zeros_like(state[name])
            held[tuple(map(slice, value.shape))] = 1
            full[client][name] = full[client][name] - state[name] * (1 - held)
    return fedavg(state, full, weights, round_number)


def norm_shares(state, updates, weights):
    """HetLoRA's weights: ‖B_k·A_k‖ over all modules."""
    norms = {}
    for client, update in sorted(updates.items()):
        products = [B @ A for module in modules(state) for B, A in ends(state, {client: update}, module)]
        norms[client] = sum(float(product.norm() ** 2) for product in products)
    total = sum(norm**0.5 for norm in norms.values())
    return {c: norm**0.5 / total for c, norm in norms.items()} if total else weights


def hetlora_by_norm(state, updates, weights, round_number):
    """As published: the factors by norm, the head as usual."""
    after = hetlora(state, updates, norm_shares(state, updates, weights), round_number)
    return after | {
        n: v for n, v in fedavg(state, updates_of_head(updates), weights, round_number).items() if n.startswith("head.")
    }


CORRECT: dict[str, tuple[Any, dict[str, Any]]] = {
    "fedavg": (fedavg, {"promise": FACTORS}),
    "fedavg without a head": (fedavg, {"promise": FACTORS, "trains": ("lora_A", "lora_B")}),
    "fedavg, changes": (padded_changes, {"promise": FACTORS, "ranks": "changes"}),
    "hetlora, held": (hetlora, {"promise": FACTORS, "ranks": "held"}),
    "hetlora by norm": (hetlora_by_norm, {"promise": FACTORS, "ranks": "held", "reweigh": norm_shares}),
    "ffa, changes": (padded_changes, {"promise": EXACT, "trains": B_ONLY, "ranks": "changes"}),
    "rolora": (fedavg, {"promise": EXACT, "trains": lambda r: ("lora_B", "head") if r % 2 else ("lora_A",)}),
    "fedex": (fedex, {"promise": EXACT, "at_scale": lambda s: fedex}),
    "flora, held": (flora, {"promise": EXACT, "ranks": "held", "refuses": (ValueError, torch.linalg.LinAlgError)}),
    "flexlora, held": (flexlora, {"promise": BEST, "ranks": "held"}),
    "lora-fair": (lora_fair, {"promise": FAIR}),
    "head": (fedavg, {"promise": "unchanged", "trains": ("head",)}),
}
