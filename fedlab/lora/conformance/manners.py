"""Properties of the conformance suite about bits, shapes, memory and bad input, one function each.

Start at ``fedlab.lora.conformance``.
"""

from __future__ import annotations

import math

import torch

from fedlab.lora.conformance.cases import (
    EVERY,
    ROUNDS,
    Case,
    Finding,
    Subject,
    aggregated,
    clone,
    complaints,
    differences,
    draw,
    none_wrong,
    same,
)
from fedlab.lora.state import State, part_of, select


def frozen_tensors(subject: Subject) -> Finding:
    """What clients do not send, and the server does not announce to rewrite, keeps every bit."""
    changed, count = [], 0
    for r in ROUNDS:
        case = subject.case(round_number=r)
        after = subject.run(case)
        sent = set(subject.names(case.state, r))
        for name in case.state:
            if name not in sent and part_of(name) not in subject.rewrites:
                count += 1
                changed += [] if same(case.state[name], after[name]) else [f"{name} in round {r}"]
    if not count:
        return Finding(None, "every tensor is trained or rewritten")
    return none_wrong(changed, count, "changed")


def order_of_replies(subject: Subject) -> Finding:
    """Five clients in four orders, their tensors in two: the same bits."""
    weights = {"client-0": 0.3, "client-1": 0.15, "client-2": 0.05, "client-3": 0.4, "client-10": 0.1}
    wrong: list[str] = []
    for r in ROUNDS:
        case = subject.case(weights=weights, round_number=r)
        reference = subject.run(case)
        clients = list(weights)
        for order in (clients[::-1], clients[2:] + clients[:2], sorted(clients)[1::2] + sorted(clients)[::2]):
            updates = {c: dict(reversed(case.updates[c].items())) for c in order}
            other = subject.run(Case(case.state, updates, {c: weights[c] for c in reversed(order)}, r))
            wrong += [f"{name} in round {r}" for name in differences(reference, other)]
    return none_wrong(wrong, None, "differ")


def shapes_and_dtype(subject: Subject) -> Finding:
    """The tensors of the state come back, of the same shapes, float32 and finite; beside them,
    only residuals that fit.
    """
    wrong: list[str] = []
    for r in ROUNDS:
        case = subject.case(EVERY, round_number=r)
        wrong += complaints(case, subject.run(case))
    return none_wrong(wrong, None, "are wrong", "all fit")


def nan_and_infinity(subject: Subject) -> Finding:
    """An update with one NaN or infinite entry is refused (ValueError, or what ``refuses`` names) or
    comes out finite.
    """
    case = subject.case()
    names = {part_of(name): name for name in sorted(case.updates["client-1"])}
    refused, silent = 0, []
    for name in names.values():
        for value in (math.nan, math.inf, -math.inf):
            bad = case.copy()
            bad.updates["client-1"][name].view(-1)[1] = value
            try:
                after = subject.run(bad)
            except subject.refuses:
                refused += 1
                continue
            if lost := [n for n, v in after.items() if not bool(torch.isfinite(v).all())]:
                silent.append(f"{lost[0]} after {value} in {name}")
    if not names:
        return Finding(None, "nothing is trained")
    others = 3 * len(names) - refused
    fine = f"{refused} refused" + (f", {others} came out finite" if others else "")
    return none_wrong(silent, None, "are not finite", fine)


def client_isolation(subject: Subject) -> Finding:
    """What a client, also a new one, starts the next round from holds nothing of another but through the aggregate."""
    clients = ["client-0", "client-1", "client-2", "client-3"]
    wrong = [f"the state through the memory of an update, {name}" for name in _aliases(subject)]
    if subject.personal:
        ours, theirs = _starts(subject, clients, seed=0), _starts(subject, clients, seed=1)
        wrong += [f"{c} {name}" for c in clients if c != "client-2" for name in differences(ours[c], theirs[c])]
    if subject.start is None:
        return none_wrong(wrong, None, "depend on another client", "all start from one state of its own memory")
    ours, theirs = _starts(subject, clients, seed=0), _starts(subject, clients[::-1], seed=0)
    wrong += [f"{c} {name} through the order of clients" for c in clients for name in differences(ours[c], theirs[c])]
    theirs = _starts(subject, clients, seed=0, train=True)
    wrong += [
        f"{c} {name} through training of the client before" for c in clients for name in differences(ours[c], theirs[c])
    ]
    return none_wrong(wrong, None, "depend on another client")


def _aliases(subject: Subject) -> list[str]:
    """Tensors of the new state, and the server's, that change when clients reuse the memory of their updates."""
    case = subject.case().copy()
    after, kept = aggregated(subject.server, case)
    before = clone(after), clone(kept)
    for update in case.updates.values():
        for value in update.values():
            value.fill_(math.pi)
    return differences(before[0], after) + differences(before[1], kept)


def _starts(subject: Subject, order: list[str], seed: int, train: bool = False) -> dict[str, State]:
    """What each client starts round 2 from.

    ``seed`` moves client-2's personal tensors; with ``train`` clients edit theirs in place.
    """
    case = subject.case().copy()
    for client in case.updates:
        owner = f"{client}, {seed}" if client == "client-2" else client
        own = {n: draw(v.shape, "personal", owner, n) for n, v in select(case.state, subject.personal).items()}
        if subject.keep is not None:
            subject.keep(client, own)
        else:
            case.updates[client] |= own
    after, _ = aggregated(subject.server, case)
    starts: dict[str, State] = {}
    for client in order:
        received = clone(after)
        mine = subject.start(received, client) if subject.start is not None else received
        starts[client] = clone(mine)
        if train:
            for value in mine.values():
                value.fill_(math.e)
    return starts
