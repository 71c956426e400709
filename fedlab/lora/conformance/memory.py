"""Properties of the conformance suite about what a server keeps between rounds, one function each.

An aggregator keeps nothing but the ``server_state`` that it hands out. Start at ``fedlab.lora.conformance``.
"""

from __future__ import annotations

from safetensors.torch import load, save

from fedlab.lora.aggregator import ServerState
from fedlab.lora.conformance.cases import (
    Case,
    Finding,
    Step,
    Subject,
    aggregated,
    clone,
    differences,
    draw_state,
    none_wrong,
)
from fedlab.lora.state import State

LENGTH = 4  # rounds in a row


def same_call_twice(subject: Subject) -> Finding:
    """The same arguments give the same bits, in the first round and in later ones: nothing is drawn from a global
    generator, nothing is remembered between calls.
    """
    wrong: list[str] = []
    for case, server_state in _rounds(subject):
        first, second = (subject.step(case, server_state) for _ in range(2))
        wrong += _differences(first, second, f"in round {case.round_number}")
    return none_wrong(wrong, None, "differ")


def nothing_in_place(subject: Subject) -> Finding:
    """State, server state, updates and weights are afterwards what they were; later states may hold a residual."""
    wrong: list[str] = []
    for case, server_state in _rounds(subject):
        given, kept = case.copy(), clone(server_state)
        aggregated(subject.server, given, kept)
        wrong += [f"state {name}" for name in differences(case.state, given.state)]
        wrong += [f"server state {name}" for name in differences(server_state, kept)]
        wrong += [
            f"update {c} {name}"
            for c in case.updates
            for name in differences(case.updates[c], given.updates.get(c, {}))
        ]
        wrong += [f"client {c}" for c in sorted(given.updates.keys() - case.updates.keys())]
        wrong += [] if given.weights == case.weights else ["weights"]
    return none_wrong(wrong, None, "were edited")


def save_load_go_on(subject: Subject) -> Finding:
    """After every round, what was saved to a file and read by another process goes on with the same bits."""
    rounds = _rounds(subject)
    wrong: list[str] = []
    for case, server_state in rounds[1:]:
        wanted = subject.step(case, server_state)
        loaded = Case(_through_a_file(case.state), case.updates, case.weights, case.round_number)
        found = subject.step(loaded, _through_a_file(server_state), subject.fresh())
        wrong += _differences(wanted, found, f"in round {case.round_number}")
    kept = max(len(server_state) for _, server_state in rounds)
    return none_wrong(wrong, None, "differ", f"to the bit, {kept} tensors of the server's" if kept else "")


def _rounds(subject: Subject) -> list[tuple[Case, ServerState]]:
    """The arguments of rounds in a row, each from what the one before returned."""
    state = draw_state()
    server_state = dict(subject.server.init(clone(state)))
    found = []
    for number in range(1, LENGTH + 1):
        case = subject.case(state=state, round_number=number)
        found.append((case, clone(server_state)))
        state, server_state = subject.step(case, server_state)
    return found


def _differences(first: Step, second: Step, where: str) -> list[str]:
    """Names of the tensors that differ between two answers."""
    states = [f"{name} {where}" for name in differences(first[0], second[0])]
    return states + [f"server state {name} {where}" for name in differences(first[1], second[1])]


def _through_a_file(tensors: State) -> State:
    """What a safetensors file gives back."""
    found: State = load(save({name: value.contiguous() for name, value in tensors.items()}))
    return found
