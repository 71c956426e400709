"""What hostile clients may send, for tests and robustness studies. No defence: those are in ``fedlab.lora.robust``.

``attack(name, updates, attackers, seed, **options)`` takes what every client would honestly send and returns what
arrives: the attackers' updates replaced, the others' as they were. Draws come from one named stream per attacker, so
they depend neither on the order of clients nor on the other attackers. ``flip_labels`` poisons the data instead, before
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from fedlab.lora.state import State
from fedlab.seeds import client_order, random_stream


def attack(
    name: str, updates: Mapping[str, State], attackers: Collection[str], seed: int, **options: float | None
) -> dict[str, State]:
    """The updates after the attack ``name`` (a key of ATTACKS). The input is not changed.

    Raises ValueError for an unknown attack or attacker; an option that the attack lacks is a TypeError.
    """
    if name not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {name!r}")
    if unknown := sorted(set(attackers) - updates.keys()):
        raise ValueError(f"attacker {unknown[0]!r} is none of the {len(updates)} clients")
    hostile = sorted(set(attackers), key=client_order)
    replaced = ATTACKS[name](updates, hostile, seed, **options) if hostile else {}
    return {client: replaced.get(client, update) for client, update in updates.items()}


def sign_flip(updates: Mapping[str, State], attackers: list[str], seed: int, *, scale: float = 1.0) -> dict[str, State]:
    """u ← −scale·u of the attacker's own honest update. scale = n/f − 1 turns the mean to zero; scale = 1 passes any
    norm bound.
    """
    return {client: {name: -scale * value for name, value in updates[client].items()} for client in attackers}


def scaling(updates: Mapping[str, State], attackers: list[str], seed: int, *, factor: float = 10.0) -> dict[str, State]:
    """u ← factor·u: the model replacement of Bagdasaryan et al. 2018 (arXiv 1807.00459), where factor is about n/f."""
    return {client: {name: factor * value for name, value in updates[client].items()} for client in attackers}


def gaussian(updates: Mapping[str, State], attackers: list[str], seed: int, *, std: float = 1.0) -> dict[str, State]:
    """u ← N(0, std²) in every entry, drawn anew per attacker (Blanchard et al. 2017). Raises ValueError for std < 0."""
    if not 0 <= std < math.inf:
        raise ValueError(f"std must be >= 0 and finite, got {std}")
    result: dict[str, State] = {}
    for client in attackers:
        draws = random_stream(seed, "attack-gaussian", client)
        own = updates[client]
        noise = {
            name: torch.from_numpy(np.asarray(draws.normal(0.0, std, tuple(own[name].shape)))) for name in sorted(own)
        }
        result[client] = {name: noise[name].to(value.dtype) for name, value in own.items()}
    return result


def little_is_enough(
    updates: Mapping[str, State], attackers: list[str], seed: int, *, z: float | None = None
) -> dict[str, State]:
    """All attackers send μ − z·σ, per coordinate, of what they themselves would honestly send (Baruch et al. 2019,
    arXiv 1902.06156).

    Small enough to hide in the spread of honest updates, and in one direction everywhere. σ is the corrected sample
    deviation. z None takes the paper's largest z that hides among n clients: with s = ⌊n/2 + 1⌋ − f supporters needed,
    Φ(z) = (n − f − s)/(n − f). Raises ValueError for one attacker alone (no spread to estimate) and, with z None, if
    attackers are so many or so few that the formula has no finite answer: state z then.
    """
    n, f = len(updates), len(attackers)
    if f < 2:
        raise ValueError(
            f"attackers = {attackers}: little_is_enough estimates a spread from their updates and needs at least 2"
        )
    if z is None:
        hidden = (n - f - (n // 2 + 1 - f)) / max(n - f, 1)
        if not 0 < hidden < 1:
            raise ValueError(
                f"z = None has no answer for {f} attackers of {n} clients (Φ(z) = {hidden:.3g}): state z, for"
                " example 1.0"
            )
        z = NormalDist().inv_cdf(hidden)
    sent: State = {}
    for name, like in updates[attackers[0]].items():
        own = torch.stack([updates[client][name].double() for client in attackers])
        sent[name] = (own.mean(0) - z * own.std(0)).to(like.dtype)
    return {client: {name: value.clone() for name, value in sent.items()} for client in attackers}


def nan(updates: Mapping[str, State], attackers: list[str], seed: int) -> dict[str, State]:
    """NaN in every entry: one such client makes any mean NaN."""
    return {
        client: {name: torch.full_like(value, math.nan) for name, value in updates[client].items()}
        for client in attackers
    }


def flip_labels(labels: Tensor, classes: int) -> Tensor:
    """y → classes − 1 − y. Raises ValueError unless labels are integers in [0, classes)."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(
            f"labels must be in [0, classes) = [0, {classes}), got {labels.min().item()} to {labels.max().item()}"
        )
    return classes - 1 - labels


ATTACKS: dict[str, Callable[..., dict[str, State]]] = {
    "gaussian": gaussian,
    "little_is_enough": little_is_enough,
    "nan": nan,
    "scaling": scaling,
    "sign_flip": sign_flip,
}
