"""What clients spent, as the server sums it: every client at its own δ, nothing forgotten, the largest counts."""

from __future__ import annotations

import pytest

from fedlab.privacy.accounting import COARSE, FINE, Event, epsilon
from fedlab.privacy.ledger.spending import FEW, PrivacySpent, exact, merged, summary

ROUND = Event("poisson", 0.05, 0.9, 4)
OTHER = Event("full", 1.0, 8.0, 1)
DELTAS = {"many": 1e-7, "few": 1e-4}


def test_every_client_is_summed_at_its_own_delta():
    spent = PrivacySpent(DELTAS)
    for client in DELTAS:
        spent.record(client, [OTHER, OTHER])
    wanted = {client: epsilon([OTHER, OTHER], delta, interval=FINE) for client, delta in DELTAS.items()}
    assert spent.epsilons() == wanted
    assert wanted["many"] > 1.2 * wanted["few"], "which δ it is makes a difference here"
    assert [exact([OTHER, OTHER], delta) for delta in DELTAS.values()] == list(wanted.values())


@pytest.mark.parametrize("delta", [1e-7, 1e-5, 1e-3])
def test_the_quick_number_between_rounds_is_at_the_clients_delta_too(delta: float):
    spent = PrivacySpent({"c": delta})
    spent.record("c", [OTHER])
    assert spent.worst() == epsilon([OTHER], delta, interval=COARSE)


def test_the_quick_number_is_of_the_client_that_spent_most():
    spent = PrivacySpent(dict.fromkeys("abc", 1e-5))
    spent.record("a", [ROUND])
    spent.record("b", [ROUND] * 9)
    spent.record("c", [ROUND] * 3)
    assert spent.worst() == epsilon([ROUND] * 9, 1e-5, interval=COARSE)
    spent.record("c", [Event("full", 1.0, 0.0, 1)])
    assert spent.worst() == float("inf"), "a release without noise"
    assert PrivacySpent({}).worst() == 0.0


def test_a_large_client_with_little_noise_has_spent_more_than_a_small_one_with_much():
    """σ is calibrated for each client's size: after one round of several, the largest sampling rate spent least."""
    spent = PrivacySpent(dict.fromkeys("abc", 1e-5))
    rounds = {"a": Event("poisson", 0.1064, 0.6083, 1), "b": Event("poisson", 0.0245, 0.4648, 1)}
    for client, event in rounds.items():
        spent.record(client, [event])
    each = {client: epsilon([event], 1e-5, interval=COARSE) for client, event in rounds.items()}
    assert each["b"] > each["a"] + 0.4
    assert spent.worst() == each["b"]


# calibrate_sigma(48 / n, 3, 6.0, 1e-5) for n = 400, 500, …, 2000
CALIBRATED = [
    0.6261,
    0.5938,
    0.5705,
    0.5526,
    0.5384,
    0.5267,
    0.5169,
    0.5085,
    0.5011,
    0.4946,
    0.4888,
    0.4836,
    0.4789,
    0.4746,
    0.4706,
    0.4669,
    0.4635,
]


def test_of_many_clients_whose_noise_is_calibrated_the_largest_is_shown():
    """Each for ε = 6 in three rounds at its own size; they took part in one, two or three."""
    sizes = {f"c{n}": n for n in range(400, 2100, 100)}
    assert len(sizes) > FEW
    noise = dict(zip(sizes.values(), CALIBRATED, strict=True))
    for most in (1, 2, 3):
        spent = PrivacySpent(dict.fromkeys(sizes, 1e-5))
        for client, n in sizes.items():
            spent.record(client, [Event("poisson", 48 / n, noise[n], 1 + n // 100 % most)])
        wanted = max(epsilon(spent.events(client), 1e-5, interval=COARSE) for client in sizes)
        assert spent.worst() == pytest.approx(wanted, abs=1e-3)


def test_what_is_assumed_counts_until_the_ledger_is_seen_and_for_good_where_nothing_was_proven():
    spent = PrivacySpent({"a": 1e-5, "b": 1e-5})
    spent.record("a", [ROUND])
    spent.assume("a", ROUND)
    spent.assume("a", OTHER, for_good=True)
    assert spent.events("a") == merged([ROUND, ROUND, OTHER])
    assert spent.unseen() == ["a"]
    spent.record("a", [ROUND])
    assert spent.events("a") == merged([ROUND, OTHER])
    assert spent.unseen() == []
    assert spent.events("b") == ()
    with pytest.raises(KeyError):
        spent.record("nobody", [])


def test_equal_mechanisms_are_merged_and_unlike_ones_are_not():
    events = [ROUND, OTHER, Event("poisson", 0.05, 0.9, 6), Event("poisson", 0.05, 1.1, 4), Event("full", 0.05, 0.9, 4)]
    assert merged(events) == merged(reversed(events))
    assert set(merged(events)) == {Event("poisson", 0.05, 0.9, 10), *events[3:], OTHER}


def test_the_maximum_is_the_largest_and_the_median_is_called_so():
    assert summary({"a": 1.0, "b": 5.0, "c": 2.0}) == {"max": 5.0, "median": 2.0}
