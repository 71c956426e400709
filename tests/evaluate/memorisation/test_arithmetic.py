"""The figures against slow references in float64, and that the bounds on ε are bounds."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from fedlab.evaluate.memorisation import exposure, losses, membership, rates
from fedlab.evaluate.memorisation.membership import Claim, Pairs

few = st.lists(st.integers(0, 6), min_size=1, max_size=25)  # with many ties


@given(few, few)
def test_the_area_is_the_share_of_ordered_pairs(members: list[int], others: list[int]):
    won = sum(Fraction(a > b) + Fraction(a == b, 2) for a in members for b in others)
    found = rates.auc(np.array(members, dtype=float), np.array(others, dtype=float))
    assert found == pytest.approx(float(won / (len(members) * len(others))))


def test_the_area_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    a, b = rng.normal(0.4, 1, 300), rng.normal(0, 1, 200)
    wanted = roc_auc_score(np.repeat([1, 0], [300, 200]), np.concatenate([a, b]))
    assert rates.auc(a, b) == pytest.approx(wanted, abs=1e-12)


@given(few, few, st.sampled_from([0.01, 0.1, 0.5]))
def test_hits_at_few_false_alarms(members: list[int], others: list[int], rate: float):
    def alarms(threshold: float) -> float:
        return sum(other > threshold for other in others) / len(others)

    lowest = min(t for t in others if alarms(t) <= rate)
    found = rates.hits_at(np.array(members), np.array(others), rate)
    assert found == sum(member > lowest for member in members)


@given(st.integers(0, 40), st.integers(1, 40))
def test_limits_of_a_rate_are_scipys(hits: int, trials: int):
    hits = min(hits, trials)
    wanted = binomtest(hits, trials).proportion_ci(0.95, "exact")
    assert rates.clopper_pearson(hits, trials, 0.95) == pytest.approx((wanted.low, wanted.high))


def test_a_bootstrap_interval_covers_and_is_seeded():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.5, 1, 400), rng.normal(0, 1, 400)
    low, high = rates.auc_interval(a, b, 0.95, 0)
    assert low < rates.auc(a, b) < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 * 2 / 400), rel=0.3)
    assert (low, high) == rates.auc_interval(a, b, 0.95, 0)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_ratio_is_that_of_mean_likelihoods_of_models_that_did_not_see_a_record(seed: int):
    rng = np.random.default_rng(seed)
    final, known = rng.gamma(2, 3, 7), rng.gamma(2, 3, (3, 7))
    outside = rng.random((3, 7)) < 0.5
    outside[0] = True
    found = membership.log_ratio(final, known, outside)
    for i in range(7):
        likely = [math.exp(-known[k, i]) for k in range(3) if outside[k, i]]
        assert found[i] == pytest.approx(math.log(math.exp(-final[i]) / (sum(likely) / len(likely))), abs=1e-9)


def test_rmias_own_score_orders_records_as_the_ratio_does():
    """Zarifzadeh et al., eq. 2 to 4, over all other records as population, γ = 1."""
    rng = np.random.default_rng(3)
    ratio = rng.normal(0, 1, 60)
    ratio[:30] += 0.7

    def score(x: int) -> float:
        return sum(math.exp(ratio[x]) / math.exp(z) >= 1 for z in ratio) / len(ratio)

    scores = np.array([score(x) for x in range(60)])
    assert rates.auc(scores[:30], scores[30:]) == pytest.approx(rates.auc(ratio[:30], ratio[30:]))


def test_what_is_no_number_is_a_loss_that_tells_nothing():
    class Model:
        class tokenizer:
            pad_token_id = 0

        class objective:
            @staticmethod
            def per_example_loss(model: object, batch: torch.Tensor) -> torch.Tensor:
                return batch

    known = torch.tensor([1.0, math.nan, math.inf, 2.0])
    found = losses.record_losses(Model(), np.array([3, 1, 2, 4]), lambda chunk, pad: known[chunk], 2)  # type: ignore
    assert found.tolist() == [1.0, losses.MOST, losses.MOST, 2.0]
    nothing = membership.log_ratio(np.full(4, losses.MOST), found[None], np.ones((1, 4), dtype=bool))
    assert np.isfinite(nothing).all()


def test_large_losses_make_no_overflow():
    found = membership.log_ratio(np.array([5000.0]), np.array([[4990.0], [1e5]]), np.ones((2, 1), dtype=bool))
    assert found[0] == pytest.approx(-5000 + 4990 + math.log(2))


@given(few, st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_rank_counts_whatever_is_as_likely_and_no_secret(losses: list[int], count: int, seed: int):
    losses = [*losses, 1, 2]
    chosen = np.random.default_rng(seed).permutation(len(losses))[: min(count, len(losses) - 1)]
    found = exposure.ranks_of(np.array(losses, dtype=float), chosen)
    for i, rank in zip(chosen, found, strict=True):
        assert rank == 1 + sum(losses[j] <= losses[i] for j in range(len(losses)) if j not in chosen)


def test_exposure_is_equation_3():
    assert exposure.exposure(1, 1024) == 10
    assert exposure.exposure(1024, 1024) == 0
    assert exposure.middle(np.array([9, 1, 5])) == 5
    assert exposure.middle(np.array([9, 1, 5, 7])) == 5, "half of them do not exceed it"


def flips(epsilon: float, count: int, rng: np.random.Generator) -> tuple[np.ndarray, Pairs]:
    """Scores of pairs by the strongest mechanism that keeps ε for add or remove: it says which of the two was in, and
    lies with the odds of 2ε for a swap.
    """
    positions = rng.permutation(2 * count)
    pairs = Pairs(positions[:count], positions[count:])
    truth = rng.random(count) < 1 / (1 + math.exp(-2 * epsilon))
    return np.concatenate([np.where(truth, 1.0, 0.0), np.where(truth, 0.0, 1.0)]), pairs


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_membership_shows_no_more_than_there_is(epsilon: float):
    rng = np.random.default_rng(4)
    wrong = 0
    for _ in range(60):
        scores, pairs = flips(epsilon, 300, rng)
        wrong += membership.epsilon_bound(scores, pairs, Claim(epsilon, 1e-7)) > epsilon
    assert wrong <= 8, "at most 5 % of 60, and three standard deviations"


def test_membership_shows_most_of_it_where_scores_tell_all():
    scores, pairs = flips(50.0, 1000, np.random.default_rng(5))
    assert membership.epsilon_bound(scores, pairs, None) > 1.8
    assert membership.epsilon_bound(scores, pairs, Claim(20.0, 1e-5)) == 0.0, "(1 + e^ε)·δ says nothing any more"


def test_an_exposure_shows_no_more_than_there_is():
    """Ranks of the mechanism that says the secret with the odds of ε, and otherwise anything."""
    rng, space, epsilon = np.random.default_rng(6), 500, 2.0
    wrong = 0
    for _ in range(300):
        first = rng.random(3) < math.exp(epsilon) / space
        ranks = np.where(first, 1, rng.integers(1, space + 1, 3))
        wrong += exposure.epsilon_bound(exposure.middle(ranks), space, 1, Claim(epsilon, 1e-6)) > epsilon
    assert wrong <= 24


def test_several_records_of_a_secret_show_less_of_one_and_a_client_is_protected_whole():
    one = exposure.epsilon_bound(1, 1000, 1, None)
    assert one == pytest.approx(math.log((0.025 - 1e-5) * 1000))
    claim = Claim(1.0, 1e-6)
    four = exposure.epsilon_bound(1, 1000, 4, claim)
    delta = 1e-6 * (math.exp(4) - 1) / (math.e - 1)
    assert four == pytest.approx(math.log((0.025 - delta) * 1000) / 4)
    assert exposure.epsilon_bound(1, 1000, 4, Claim(1.0, 1e-6, "client")) == pytest.approx(one, rel=1e-3)
    assert exposure.epsilon_bound(1, 1000, 9, Claim(9.0, 1e-5)) == 0.0
