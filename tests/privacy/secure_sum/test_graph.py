from fractions import Fraction
from itertools import combinations
from math import comb, log2

import pytest

from fedlab.errors import SumRefused
from fedlab.privacy.secure_sum import graph as module
from fedlab.privacy.secure_sum.graph import COMPLETE, graph_of, ring


def names(count: int) -> tuple[str, ...]:
    return tuple(sorted(f"client-{i}" for i in range(count)))


@pytest.mark.parametrize(("count", "colluding"), [(3, 0), (64, 5), (65, 0), (200, 3)])
def test_neighbours_are_each_other_s(count: int, colluding: int):
    found = graph_of("setting", names(count), (count + colluding) // 2 + 1, colluding)
    around = {client: found.neighbours(client) for client in names(count)}
    for client, peers in around.items():
        assert len(peers) == len(set(peers)) == found.degree
        assert client not in peers
        assert all(client in around[peer] for peer in peers)
    assert (found.degree == count - 1) == (count <= COMPLETE)
    assert found.threshold <= found.degree + 1


def test_the_order_is_that_of_the_setting():
    first, again, other = (graph_of(s, names(80), 41, 0).order for s in ("a", "a", "b"))
    assert first == again
    assert first != other
    assert set(first) == set(names(80))


@pytest.mark.parametrize(("count", "colluding"), [(65, 0), (100, 10), (300, 0), (1000, 0), (1000, 100)])
def test_a_ring_keeps_what_its_docstring_says(count: int, colluding: int):
    degree, threshold = ring(count, colluding)
    if degree == count - 1:
        return
    half = degree // 2
    window = threshold - half - 2
    assert 0 <= window < half
    assert exceeds(count, colluding, half, window) * count <= Fraction(1, 2**80)
    if window:  # no smaller one would do
        assert exceeds(count, colluding, half, window - 1) * count > Fraction(1, 2**80)
    assert exceeds(count, count // 4, degree, degree + 1 - threshold) * count <= Fraction(1, 2**20)


def exceeds(count: int, marked: int, drawn: int, most: int) -> Fraction:
    """The probability that more than ``most`` of ``drawn`` are marked, exactly."""
    ways = sum(comb(marked, i) * comb(count - marked, drawn - i) for i in range(most + 1, min(marked, drawn) + 1))
    return Fraction(ways, comb(count, drawn))


def test_tails_are_those_of_counting():
    marked = {0, 1, 2}
    draws = list(combinations(range(8), 4))
    share = sum(len(marked & set(draw)) > 1 for draw in draws) / len(draws)
    assert module._tail(8, 3, 4, 1) == pytest.approx(log2(share))
    assert module._tail(8, 3, 4, 3) == -float("inf")


def test_for_a_thousand_clients_a_hundred_neighbours_or_so():
    assert ring(1000, 0) == (114, 59)
    assert ring(100, 60) == (99, 81), "so many colluding clients that everybody must be everybody's neighbour"


@pytest.mark.parametrize(("count", "survivors", "colluding"), [(3, 4, 0), (4, 2, 0), (4, 3, 2), (1, 1, 0)])
def test_sets_that_are_too_small_are_refused(count: int, survivors: int, colluding: int):
    with pytest.raises(SumRefused, match="survivors"):
        graph_of("setting", names(count), survivors, colluding)
