"""What no honest server asks is refused; and whatever it says to whom, at most one sum comes out, of enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlab.errors import SumRefused
from fedlab.privacy.secure_sum.graph import graph_of
from fedlab.privacy.secure_sum.keys import public_of, signed_cipher_key, signed_mask_key
from fedlab.privacy.secure_sum.participant import Prepared, prepare, revealed
from fedlab.protocol.sum_messages import SumPlan

ZEROS = {"a": np.zeros(4, np.int64)}
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def prepared_again(case: Any, client: str, plan: SumPlan) -> Prepared:
    return prepare(case.identities[client], case.ciphers[client], case.run, client, plan)


def changed(case: Any, **fields: Any) -> SumPlan:
    plan = case.server.plan(["client-0"])
    return replace(plan, setting=replace(plan.setting, **fields))


def test_invented_clients_are_refused(sums: Any):
    case, strangers = sums(4, 3), sums(4, 3)
    plan = case.server.plan(["client-0"])
    invented = strangers.keys["client-1"]
    with pytest.raises(SumRefused, match="cipher key of client-1"):  # signed, but by nobody of the sum
        prepared_again(case, "client-0", replace(plan, keys=plan.keys | {"client-1": invented}))
    own = signed_cipher_key(strangers.identities["client-1"], case.run, "client-1", public_of(bytes(32)))
    forged = replace(own, identity=case.keys["client-1"].identity)
    with pytest.raises(SumRefused, match="cipher key of client-1"):
        prepared_again(case, "client-0", replace(plan, keys=plan.keys | {"client-1": forged}))
    elsewhere = signed_cipher_key(case.identities["client-1"], "b" * 32, "client-1", case.keys["client-1"].public)
    with pytest.raises(SumRefused, match="cipher key of client-1"):  # of another run
        prepared_again(case, "client-0", replace(plan, keys=plan.keys | {"client-1": elsewhere}))
    del plan.keys["client-2"]
    with pytest.raises(SumRefused, match="cipher key of client-2"):
        prepared_again(case, "client-0", plan)


def test_one_client_under_two_names_is_refused(sums: Any):
    case = sums(4, 3)
    participants = case.server.setting.participants
    twice = participants | {"client-2": participants["client-1"]}
    with pytest.raises(SumRefused, match="same identity"):
        prepared_again(case, "client-0", changed(case, participants=twice))
    plan, public = case.server.plan(["client-0"]), case.keys["client-1"].public
    same = signed_cipher_key(case.identities["client-2"], case.run, "client-2", public)
    with pytest.raises(SumRefused, match="same cipher key"):
        prepared_again(case, "client-0", replace(plan, keys=plan.keys | {"client-2": same}))
    order, digest = case.server.order(["client-0"]), case.server.digest
    copied = order.keys["client-1"]
    stolen = signed_mask_key(case.identities["client-2"], digest, "client-2", copied.public, copied.commitment)
    case.server.prepared["client-2"] = replace(case.server.prepared["client-2"], key=stolen)
    with pytest.raises(SumRefused, match="same mask key"):
        case.mask("client-0", ZEROS)


def test_a_client_is_in_a_sum_as_itself(sums: Any):
    case = sums(4, 3)
    others = {c: key for c, key in case.server.setting.participants.items() if c != "client-0"}
    for participants in (others, others | {"client-0": "0" * 64}):
        with pytest.raises(SumRefused, match="another identity of client-0"):
            prepared_again(case, "client-0", changed(case, participants=participants))


@pytest.mark.parametrize(
    ("survivors", "colluding", "message"),
    [(5, 0, "needs 5 survivors"), (2, 0, "at least 3"), (3, 2, "at least 4"), (1, 0, "at least 3")],
)
def test_settings_that_allow_two_sums_are_refused(sums: Any, survivors: int, colluding: int, message: str):
    case = sums(4, 3)
    with pytest.raises(SumRefused, match=message):
        prepared_again(case, "client-0", changed(case, survivors=survivors, colluding=colluding))


def test_a_mask_key_of_another_sum_or_client_is_refused(sums: Any):
    case = sums(4, 3)
    again = sums(4, 3, name="round-2-0", identities=case.identities, ciphers=case.ciphers)
    case.server, kept = again.server, case.server
    with pytest.raises(SumRefused, match="is not the one that was prepared"):
        case.mask("client-0", ZEROS)
    case.server = kept
    for stranger in (again.server.prepared["client-1"], case.server.prepared["client-2"]):
        good = case.server.prepared["client-1"]
        case.server.prepared["client-1"] = replace(good, key=stranger.key)
        with pytest.raises(SumRefused, match="mask key of client-1 was not signed"):
            case.mask("client-0", ZEROS)
        case.server.prepared["client-1"] = good
    order = case.server.order(["client-0"])
    del order.keys["client-3"]
    case.server.order = lambda clients: order  # type: ignore[method-assign]
    with pytest.raises(SumRefused, match="mask key of client-3 is missing"):
        case.mask("client-0", ZEROS)


def test_participants_who_see_the_sum_otherwise_do_not_mask_with_each_other(sums: Any):
    """The setting is signed with the mask key: nobody masks with somebody who was shown another one."""
    case = sums(5, 4)
    fewer = sums(4, 3, identities=case.identities, ciphers=case.ciphers)
    case.server.prepared["client-1"] = fewer.server.prepared["client-1"]
    with pytest.raises(SumRefused, match="mask key of client-1 was not signed"):
        case.mask("client-0", ZEROS)


def test_shares_are_revealed_for_sets_that_a_quorum_confirmed(sums: Any):
    case = sums(6, 4)
    quorum, gone = case.server.graph.quorum, {"client-5"}
    inside = case.clients[:5]
    good = case.confirm(inside[:quorum], gone)
    assert case.reveal("client-0", gone, good)
    other = case.confirm(inside[:quorum], {"client-4"})
    strangers = sums(6, 4).confirm(inside[:quorum], gone)
    few = dict(list(good.items())[:-1])
    padded = few | {"nobody": next(iter(good.values())), "client-5": next(iter(good.values()))}
    for confirmations in ({}, few, padded, other, strangers):
        with pytest.raises(SumRefused, match="confirmed who dropped out"):
            case.reveal("client-0", gone, confirmations)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ({"client-0"}, "says that client-0 dropped out"),
        ({"client-9"}, "no participant"),
        ({"client-1", "client-2", "client-3"}, "3 clients would be added up"),
    ],
)
def test_sets_that_make_no_sense_are_neither_confirmed_nor_unmasked(sums: Any, dropped: set[str], message: str):
    case = sums(6, 4)
    with pytest.raises(SumRefused, match=message):
        case.confirm(["client-0"], dropped)
    with pytest.raises(SumRefused, match=message):
        case.reveal("client-0", dropped, {})


def test_changed_and_exchanged_shares_are_not_taken(sums: Any):
    case = sums(4, 3)
    sealed = dict(case.server.unmask_order("client-0").sealed)
    sealed["client-1"] = "00" * 48
    sealed["client-2"], sealed["client-3"] = sealed["client-3"], sealed["client-2"]
    shares = revealed(case.ciphers["client-0"], case.prepared["client-0"], (), {}, sealed)
    assert shares.keys() == {"client-0"}
    again = sums(4, 3, name="round-2-0", identities=case.identities, ciphers=case.ciphers)
    sealed = again.server.unmask_order("client-0").sealed
    assert revealed(case.ciphers["client-0"], case.prepared["client-0"], (), {}, sealed).keys() == {"client-0"}
    with pytest.raises(SumRefused, match="no neighbour"):
        revealed(case.ciphers["client-0"], case.prepared["client-0"], (), {}, {"stranger": "00" * 48})


@QUICK
@given(data=st.data(), count=st.integers(3, 12))
def test_whatever_whom_a_server_tells_it_learns_one_sum_at_most(data: st.DataObject, count: int):
    """Complete graph: honest clients are told that all are there or the one set that can be confirmed, as the server
    likes; colluding ones reveal everything. Nobody's both secrets come out, and what can be added up has enough in it.
    """
    colluding = data.draw(st.integers(0, count - 2))
    survivors = data.draw(st.integers(max(2, (count + colluding) // 2 + 1), count))
    names = tuple(f"c{i:02}" for i in range(count))
    graph = graph_of("s", names, survivors, colluding)
    check_view(data, graph, names, survivors, set(names[:colluding]))


@QUICK
@given(data=st.data())
def test_and_on_a_ring_with_colluding_clients_side_by_side(data: st.DataObject):
    """The same where everybody has few neighbours, and as many as the threshold allows for collude in any stretch."""
    from fedlab.privacy.secure_sum.graph import Graph

    count, half = data.draw(st.integers(16, 30)), data.draw(st.integers(3, 6))
    names = tuple(f"c{i:02}" for i in range(count))
    colluding = data.draw(st.sets(st.sampled_from(names), max_size=count // 3))
    stretches = [[names[(i + j) % count] in colluding for j in range(half)] for i in range(count)]
    window = max(sum(stretch) for stretch in stretches)
    if window >= half:
        return
    survivors = (count + len(colluding)) // 2 + 1
    graph = Graph(names, 2 * half, half + window + 2, survivors)
    check_view(data, graph, names, survivors, colluding)


def check_view(data: st.DataObject, graph: Any, names: tuple[str, ...], survivors: int, colluding: set[str]) -> None:
    count, honest = len(names), [c for c in names if c not in colluding]
    gone = data.draw(
        st.one_of(
            st.sets(st.sampled_from(names), max_size=count - survivors),
            st.integers(0, count - 1).map(lambda start: {names[(start + i) % count] for i in range(count - survivors)}),
        )
    )
    told_all = data.draw(st.one_of(st.just(set(honest)), st.just(set()), st.sets(st.sampled_from(honest))))
    seeds, masks = set(), set()  # whose secrets the server can put together
    for client in names:
        around = [client, *graph.neighbours(client)]
        both = [c for c in around if c in colluding]
        say_all = [c for c in around if c in told_all]
        say_set = [c for c in around if c not in colluding and c not in told_all and c not in gone]
        own_seed = len(both) + len(say_all) + (0 if client in gone else len(say_set))
        own_mask = len(both) + (len([c for c in say_set if c != client]) if client in gone else 0)
        if own_seed >= graph.threshold or client in colluding:
            seeds.add(client)
        if own_mask >= graph.threshold or client in colluding:
            masks.add(client)
    assert not (seeds & masks) - colluding, "both secrets of an honest client"
    # what the server can take off: a set of honest clients whose neighbours are in it, or gave their masks
    left, components = {c for c in honest if c not in masks}, []
    while left:
        component, todo = set(), [left.pop()]
        while todo:
            component.add(client := todo.pop())
            near = [c for c in graph.neighbours(client) if c in left]
            left.difference_update(near)
            todo += near
        components.append(component)
    readable = [component for component in components if component <= seeds]
    assert len(components) <= 1 or not readable, "a part of the sum"
    for component in readable:
        assert len(component) >= survivors - len(colluding)
