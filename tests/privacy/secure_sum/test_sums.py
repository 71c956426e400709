"""Sums come out to the bit after every pattern of dropouts, and nothing else comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlab.errors import SumRefused
from fedlab.privacy.secure_sum.masking import add, shifted
from fedlab.privacy.secure_sum.participant import mask_private, pair_mask, self_mask

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values_of(clients: list[str], seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Any 64-bit numbers: the sum is modulo 2^64."""
    rng = np.random.default_rng(seed)
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    return {
        c: {
            "a": rng.integers(low, high, (3, 4), endpoint=True),
            "b": rng.integers(-5, 5, 7),
            "none": np.zeros((0, 2), np.int64),
        }
        for c in clients
    }


def plain(values: dict[str, dict[str, np.ndarray]], clients: list[str]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for c in clients:
        total = add(total, values[c])
    return total


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == np.int64 for k in a)


@QUICK
@given(data=st.data(), count=st.integers(2, 9))
def test_the_sum_is_that_of_whose_values_came_whoever_drops_out_when(sums: Any, data: st.DataObject, count: int):
    colluding = data.draw(st.integers(0, count - 2), label="colluding")
    quorum = (count + colluding) // 2 + 1
    survivors = data.draw(st.integers(max(quorum, 2), count), label="survivors")
    case = sums(count, survivors, colluding)
    values = values_of(case.clients, count)
    clients = st.sampled_from(case.clients)
    silent = data.draw(st.sets(clients, max_size=count - survivors), label="send nothing")
    inside = [c for c in case.clients if c not in silent]
    sent = {c: case.mask(c, values[c]) for c in inside}
    signing = data.draw(st.permutations(inside), label="confirm")[: max(quorum, data.draw(st.integers(0, len(inside))))]
    confirmations = case.confirm(signing, silent) if silent else {}
    mute = data.draw(st.sets(st.sampled_from(inside), max_size=len(inside)), label="reveal nothing")
    shares = {c: case.reveal(c, silent, confirmations) for c in inside if c not in mute}
    if len(shares) >= case.server.graph.threshold:
        assert same(case.server.unmasked(case.total(sent), inside, shares), plain(values, inside))
    else:
        with pytest.raises(SumRefused, match="are needed"):
            case.server.unmasked(case.total(sent), inside, shares)


def test_on_a_sparse_graph_too(sums: Any):
    case = sums(66, 40)
    assert case.server.graph.degree < 65
    values, rng = values_of(case.clients), np.random.default_rng(0)
    silent = set(rng.choice(case.clients, 7, replace=False))
    inside = [c for c in case.clients if c not in silent]
    sent = {c: case.mask(c, values[c]) for c in inside}
    confirmations = case.confirm(inside[: case.server.graph.quorum], silent)
    mute = set(rng.choice(inside, 4, replace=False))
    shares = {c: case.reveal(c, silent, confirmations) for c in inside if c not in mute}
    assert same(case.server.unmasked(case.total(sent), inside, shares), plain(values, inside))


def test_a_sum_with_nobody_missing_needs_no_confirmation(sums: Any):
    case = sums(5, 4)
    values = values_of(case.clients)
    sent = {c: case.mask(c, values[c]) for c in case.clients}
    shares = {c: case.reveal(c, (), {}) for c in case.clients}
    assert same(case.server.unmasked(case.total(sent), case.clients, shares), plain(values, case.clients))


def test_what_the_server_has_of_one_client_or_of_a_part_is_uniform(sums: Any):
    case = sums(4, 3)
    zeros = {"a": np.zeros(40_000, dtype=np.int64)}
    sent = {c: case.mask(c, zeros) for c in case.clients}
    part = case.total({c: sent[c] for c in case.clients[:3]})
    unmasked = case.server.unmasked(sent["client-0"], case.clients, {c: case.reveal(c, (), {}) for c in case.clients})
    for value in (sent["client-0"]["a"], part["a"], unmasked["a"]):  # the last with all self masks taken off
        bits = np.unpackbits(value.view(np.uint8).reshape(-1, 8), axis=1)  # [values, 64]
        deviation = (bits.mean(axis=0) - 0.5) * 2 * np.sqrt(len(bits))  # standard normal, each
        assert np.abs(deviation).max() < 5
        assert 20 < (deviation**2).sum() < 130  # chi-squared of 64 degrees
        assert len(np.unique(value)) == len(value)
        lag = np.corrcoef(value[:-1].astype(float), value[1:].astype(float))[0, 1]
        assert abs(lag) < 5 / np.sqrt(len(value))


def test_another_sum_another_mask(sums: Any):
    case = sums(3, 2)
    again = sums(3, 2, name="round-2-0", identities=case.identities, ciphers=case.ciphers)
    zeros = {"a": np.zeros(8, dtype=np.int64), "b": np.zeros(8, dtype=np.int64)}
    first, second = case.mask("client-0", zeros), again.mask("client-0", zeros)
    assert not (first["a"] == second["a"]).any()
    assert not (first["a"] == first["b"]).any()
    assert same(first, case.mask("client-0", zeros))


def test_wrong_shares_of_a_few_are_found_and_left_out(sums: Any):
    case = sums(7, 5)
    values = values_of(case.clients)
    sent = {c: case.mask(c, values[c]) for c in case.clients}
    shares = {c: case.reveal(c, (), {}) for c in case.clients}
    shares["client-3"] = dict.fromkeys(case.clients, "00" * 16)
    shares["client-4"] = dict.fromkeys(case.clients, "ff" * 16)  # no number of the field
    assert same(case.server.unmasked(case.total(sent), case.clients, shares), plain(values, case.clients))
    for liar in case.clients[2:]:
        shares[liar] = dict.fromkeys(case.clients, "00" * 16)
    with pytest.raises(SumRefused, match="wrong ones"):
        case.server.unmasked(case.total(sent), case.clients, shares)


def test_a_value_that_came_although_its_client_was_called_gone_stays_hidden(sums: Any):
    """The server has it, and takes its pairwise masks off; its own mask stays."""
    case = sums(5, 4)
    zeros = {"a": np.zeros(20_000, dtype=np.int64)}
    sent = {c: case.mask(c, zeros) for c in case.clients}
    inside, gone = case.clients[:4], {"client-4"}
    shares = {c: case.reveal(c, gone, case.confirm(inside, gone)) for c in inside}
    others = case.server.unmasked(case.total({c: sent[c] for c in inside}), inside, shares)
    assert not others["a"].any()
    late = add(others, sent["client-4"])
    private = mask_private(bytes.fromhex(case.prepared["client-4"].mask_secret))
    streams = {c: pair_mask(private, case.prepared[c].reply.key.public, case.server.digest) for c in inside}
    plus = [key for c, key in streams.items() if c < "client-4"]
    bare = shifted(late, plus, [key for c, key in streams.items() if c > "client-4"])
    for value in (late["a"], bare["a"]):
        assert len(np.unique(value)) == len(value)
        assert abs(np.unpackbits(value.view(np.uint8)).mean() - 0.5) < 0.005
    own = self_mask(bytes.fromhex(case.prepared["client-4"].seed), case.server.digest)
    assert not shifted(bare, [], [own])["a"].any(), "that is all that hides it"
