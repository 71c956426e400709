"""Properties of the conformance suite about effective weights and the head, one function each. Start at
``fedlab.lora.conformance``.

A property takes the subject and returns a finding. Whatever an aggregator raises is caught by ``check`` and fails the
property.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlab.lora.conformance.cases import (
    EVERY,
    HEAD,
    OF_PRODUCTS,
    RANK,
    ROUNDS,
    SQUARE,
    TALL,
    WIDE,
    Case,
    Finding,
    Subject,
    complaints,
    draw,
    draw_state,
    largest,
    none_wrong,
    same,
)
from fedlab.lora.state import part_of, select

SCALES = (0.5, 4.0)


def unequal_weights(subject: Subject) -> Finding:
    """Three clients of weights 0.3, 0.1 and 0.6 give the promised effective weights."""
    return _effective(subject, *(subject.case(round_number=r) for r in ROUNDS))


def uniform_weights(subject: Subject) -> Finding:
    """Three clients of equal weight."""
    weights = dict.fromkeys(("client-0", "client-1", "client-2"), 1 / 3)
    return _effective(subject, *(subject.case(weights=weights, round_number=r) for r in ROUNDS))


def wide_layer(subject: Subject) -> Finding:
    """A layer with fewer outputs than inputs. The other properties but "several rounds" use square ones."""
    return _effective(subject, *(subject.case(WIDE, round_number=r) for r in ROUNDS))


def tall_layer(subject: Subject) -> Finding:
    """A layer with more outputs than inputs."""
    return _effective(subject, *(subject.case(TALL, round_number=r) for r in ROUNDS))


def square_layer(subject: Subject) -> Finding:
    """One square layer alone."""
    shapes = {"layer.0.q": SQUARE["layer.0.q"]}
    return _effective(subject, *(subject.case(shapes, round_number=r) for r in ROUNDS))


def scale(subject: Subject) -> Finding:
    """s·(B·A + residual) is s times what is promised, for two scales s: s is applied by the model, never by the
    aggregator.
    """
    errors = {}
    for s in SCALES:
        server = subject.at_scale(s) if subject.at_scale else subject.server
        cases = [subject.case(round_number=r) for r in ROUNDS]
        errors[s] = largest([subject.error(case, subject.run(case, server), s) for case in cases])
    worst = largest(list(errors.values()))
    return Finding(
        worst <= subject.tolerance,
        "relative error " + ", ".join(f"{e:.1e} at s = {s:g}" for s, e in errors.items()),
        worst,
    )


def head(subject: Subject) -> Finding:
    """The head moves by the weighted mean of its changes; one that nobody trains keeps its bits."""
    worst, moved = 0.0, False
    for r in ROUNDS:
        case = subject.case(round_number=r)
        after = subject.run(case)
        for name in HEAD:
            wanted = case.state[name].double()
            sent = {c: u[name].double() for c, u in case.updates.items() if name in u}
            if not sent:
                if not same(case.state[name], after[name]):
                    return Finding(False, f"{name} is not trained in round {r}, but changed", 1.0)
                continue
            moved = True
            for client, change in sent.items():
                wanted = wanted + case.weights[client] * change
            worst = largest([worst, float((after[name].double() - wanted).norm() / wanted.norm())])
    return Finding(
        worst <= subject.tolerance, f"relative error {worst:.1e}" if moved else "not trained, and untouched", worst
    )


def one_client(subject: Subject) -> Finding:
    """A round with one client gives that client's own effective weights."""
    own = subject if subject.promise == "unchanged" else replace(subject, promise="mean of products")
    return _effective(own, *(subject.case(weights={"client-1": 1.0}, round_number=r) for r in ROUNDS))


def partial_participation(subject: Subject) -> Finding:
    """After a round of three, one of those and one new client make a round: nobody else counts."""
    after = subject.run(subject.case())
    return _effective(subject, subject.case(state=after, weights={"client-2": 0.25, "client-7": 0.75}, round_number=2))


def zero_change(subject: Subject) -> Finding:
    """A client that changed nothing counts with its weight."""
    cases = [subject.case(round_number=r) for r in ROUNDS]
    for case in cases:
        case.updates["client-2"] = {name: torch.zeros_like(value) for name, value in case.updates["client-2"].items()}
    return _effective(subject, *cases)


def opposite_clients(subject: Subject) -> Finding:
    """Clients that hold (B, A) and (−B, −A), which are one product, average to that product."""
    if subject.promise not in OF_PRODUCTS:
        return Finding(None, f"the promise, {subject.promise!r}, is not about products")
    case = subject.case(weights={"client-0": 0.3, "client-1": 0.7})
    first, second = case.updates["client-0"], case.updates["client-1"]
    factors = [name for name in case.state if part_of(name) != "head"]
    if not first.keys() >= set(factors):
        return Finding(None, "clients train one factor at a time")
    for name in factors:
        second[name] = -first[name] - 2 * case.state[name]
    return _effective(subject, case)


def zero_and_deficient(subject: Subject) -> Finding:
    """B = 0 at the start, with and without updates of it, and products of rank 1."""
    cases = []
    for r in ROUNDS:
        for kind in ("zero", "still", "rank 1"):
            case = subject.case(round_number=r)
            for tensors in (case.state, *case.updates.values()):
                for name in select(tensors, ["lora_B"]):
                    one = tensors[name][:, :1] * draw((1, RANK), "direction")
                    nothing = tensors is case.state or kind == "still"
                    tensors[name] = one if kind == "rank 1" else torch.zeros_like(one) if nothing else tensors[name]
            cases.append(case)
    return _effective(subject, *cases)


def bfloat16_values(subject: Subject) -> Finding:
    """Updates that crossed a bfloat16 wire give the promise for the values that arrived."""
    cases = [subject.case(round_number=r) for r in ROUNDS]
    for case in cases:
        for update in case.updates.values():
            update |= {name: value.bfloat16().float() for name, value in update.items()}
    return _effective(subject, *cases)


def several_rounds(subject: Subject) -> Finding:
    """Three rounds, each from what the one before returned, over layers of every shape: residuals add up and nothing is
    lost.
    """
    state, errors = draw_state(EVERY), []
    for r in (1, 2, 3):
        case = subject.case(state=state, round_number=r)
        state = subject.run(case)
        errors.append(subject.error(case, state))
    worst = largest(errors)
    return Finding(worst <= subject.tolerance, "relative error " + ", ".join(f"{e:.1e}" for e in errors), worst)


def unequal_ranks(subject: Subject) -> Finding:
    """Clients of rank r, r/2 and 1, each of which started from the first directions of the state."""
    if not subject.ranks:
        return Finding(None, "not claimed")
    cases = [
        subject.case(EVERY, round_number=r, ranks={"client-0": RANK, "client-1": RANK // 2, "client-2": 1})
        for r in ROUNDS
    ]
    if not any(select(update, ["lora_A", "lora_B"]) for case in cases for update in case.updates.values()):
        return Finding(None, "no factor is trained")
    if wrong := [text for case in cases for text in complaints(case, subject.run(case))]:
        return none_wrong(wrong, None, "are wrong")
    return _effective(subject, *cases)


def _effective(subject: Subject, *cases: Case) -> Finding:
    worst = largest([subject.error(case, subject.run(case)) for case in cases])
    return Finding(worst <= subject.tolerance, f"relative error {worst:.1e}", worst)
