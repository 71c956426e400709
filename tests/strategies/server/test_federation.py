"""Who takes part: caps, balance, and an assignment that depends on nothing but the clients."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.config import RunConfig
from strategies.server.federation import ClientInfo, Federation
from strategies.server.outcome import busy_seconds


def federation(clients: int, fraction: float, rounds: int, *overrides: str, nodes: int = 3) -> Federation:
    text = (
        f"[run]\nrounds={rounds}\nfraction={fraction}\n[data]\nclients={clients}\n[lora]\nrank=1\nalpha=1\n[train]\nlr=1\nsteps=1\n"
        '[privacy]\nunit="example"\nsigma=1.0\nclip=1.0\n'
    )
    infos = {f"client-{i}": ClientInfo(10 * (i + 1)) for i in range(clients)}
    return Federation(RunConfig.parse(text, overrides), infos, {}, list(range(100, 100 + nodes)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.floats(0.05, 1.0), st.integers(1, 25), st.integers(0, 99))
def test_balanced_sampling_never_exceeds_the_cap_and_always_fills_the_round(
    clients: int, fraction: float, rounds: int, seed: int
):
    fed = federation(clients, fraction, rounds, f"run.seed={seed}")
    for number in range(1, rounds + 1):
        assert len(set(fed.draw(number))) == fed.config.clients_per_round
    counts = [fed.participations[c] for c in fed.clients]
    assert max(counts) <= fed.config.participations
    assert max(counts) - min(counts) <= 1


def test_uniform_sampling_obeys_the_cap_too():
    fed = federation(6, 0.5, 40, 'run.sampling="uniform"', "privacy.participations=3")
    drawn = [fed.draw(r) for r in range(1, 41)]
    assert max(fed.participations.values()) == 3
    assert sum(map(len, drawn)) == 18
    assert drawn[-1] == []


def test_draws_depend_on_seed_and_round_only():
    first, second = federation(9, 0.4, 5), federation(9, 0.4, 5, nodes=7)
    assert [first.draw(r) for r in range(1, 6)] == [second.draw(r) for r in range(1, 6)]
    other = federation(9, 0.4, 5, "run.seed=5")
    assert [other.draw(r) for r in range(1, 6)] != [federation(9, 0.4, 5).draw(r) for r in range(1, 6)]


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_under_secure_noise_nobody_foretells_who_is_drawn(noise: str):
    """Sampling amplifies only what nobody knows, and the run's seed is known."""
    privacy = f"privacy={{unit='client', sigma=1.0, clip=1.0, noise='{noise}'}}"
    settings = ('run.sampling="poisson"', privacy, 'strategy.weights="uniform"')
    first, again = (federation(40, 0.5, 5, *settings) for _ in range(2))
    drawn = [[fed.draw(r) for r in range(1, 6)] for fed in (first, again)]
    assert (drawn[0] == drawn[1]) == (noise == "seeded")
    assert all(0 < len(clients) < 40 for clients in drawn[0])


def test_cohorts_share_the_work_and_respect_hosts():
    fed = federation(7, 1.0, 1)
    cohorts = fed.cohorts(list(fed.clients))
    assert sorted(c for cohort in cohorts.values() for c in cohort) == sorted(fed.clients)
    assert Counter(map(len, cohorts.values())) == Counter({2: 2, 3: 1})
    fed.hosts = {client: 500 + i for i, client in enumerate(fed.clients)}
    assert fed.cohorts(list(fed.clients)) == {500 + i: [client] for i, client in enumerate(fed.clients)}


def test_busy_seconds_is_the_union_of_intervals():
    assert busy_seconds([]) == 0
    assert busy_seconds([(0, 2), (1, 3), (5, 6)]) == pytest.approx(4)
    assert busy_seconds([(0, 10), (2, 3)]) == pytest.approx(10)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5))
def test_groups_are_even_and_do_not_depend_on_the_nodes(clients: int, cohort: int, nodes: int):
    fed = federation(clients, 1.0, 1, f"run.cohort={cohort}", nodes=nodes)
    groups = fed.groups(list(fed.clients))
    assert sorted(c for group in groups for c in group) == sorted(fed.clients)
    sizes = [len(group) for group in groups]
    assert max(sizes) <= cohort
    assert max(sizes) - min(sizes) <= 1
    assert groups == federation(clients, 1.0, 1, f"run.cohort={cohort}", nodes=nodes + 3).groups(
        list(reversed(fed.clients))
    )
    dealt = fed.assign(groups)
    assert sorted(map(tuple, (g for own in dealt.values() for g in own))) == sorted(map(tuple, groups))
    assert len(dealt) == min(nodes, len(groups))


def test_a_node_that_hosts_one_client_and_the_references_share_no_pass():
    fed = federation(5, 1.0, 1)
    assert [len(g) for g in fed.groups(list(fed.clients))] == [2, 3]
    assert [len(g) for g in federation(5, 1.0, 1, "train.gradients=opacus").groups(list(fed.clients))] == [1] * 5
    fed.hosts = {client: 500 + i for i, client in enumerate(fed.clients)}
    assert [len(g) for g in fed.groups(list(fed.clients))] == [1] * 5


@pytest.mark.parametrize(("clients", "sizes"), [(4, [2, 2]), (6, [3, 3]), (50, [6] * 6 + [7] * 2), (1, [1])])
def test_by_default_the_groups_are_as_many_as_nodes_can_share_evenly(clients: int, sizes: list[int]):
    fed = federation(clients, 1.0, 1)
    assert sorted(len(g) for g in fed.groups(list(fed.clients))) == sizes


def test_small_batches_share_a_pass_with_more():
    sizes = {
        batch: federation(5, 1.0, 1, f"train.batch_size={batch}").config.cohort_size for batch in (1, 4, 16, 32, 256)
    }
    assert sizes == {1: 64, 4: 32, 16: 8, 32: 4, 256: 4}


def test_groups_grow_to_512_rows_while_eight_are_left():
    sizes = {
        clients: federation(clients, 1.0, 1, "train.batch_size=32").config.cohort_size for clients in (5, 50, 100, 1000)
    }
    assert sizes == {5: 4, 50: 7, 100: 13, 1000: 16}
