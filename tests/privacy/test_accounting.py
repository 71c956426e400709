"""ε against reference values, against closed forms, and at the edges where libraries raise or lie."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedlab.errors import PrivacyError
from fedlab.privacy import accounting
from fedlab.privacy.accounting import COARSE, FINE, Event, epsilon
from fedlab.privacy.calibration import calibrate_sigma
from fedlab.privacy.sampling import fixed_batches

REFERENCE = json.loads((Path(__file__).parent / "reference_epsilon.json").read_text())
FEDSVD = Event("poisson", 128 / 11225, 0.7, 500)


def events(case: dict) -> list[Event]:
    return [Event("poisson", q, sigma, steps) for q, sigma, steps in case["mechanism"]]


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Closed form for the Gaussian mechanism with sensitivity/σ = mu (Balle and Wang 2018), by root finding."""

    def delta_of(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)

    return 0.0 if delta_of(0) <= delta else brentq(lambda e: delta_of(e) - delta, 0, 500)


@pytest.mark.parametrize("case", REFERENCE["epsilon"], ids=lambda c: c["id"])
def test_truth_pld_rdp_are_in_this_order_and_within_the_reference(case: dict):
    steps = sum(e.steps for e in events(case))
    pld = epsilon(events(case), case["delta"], interval=COARSE if steps <= 2000 else FINE)
    rdp = epsilon(events(case), case["delta"], "rdp")
    assert case["never_below"] <= pld
    assert case["epsilon"] * (1 - 1e-4) <= pld <= case["tight"][1]
    assert pld <= rdp <= case["rdp"][1] * 1.001


@pytest.mark.parametrize("case", REFERENCE["epsilon"][:4], ids=lambda c: c["id"])
def test_prv_and_the_fine_grid_agree(case: dict):
    fine = epsilon(events(case), case["delta"])
    assert fine <= epsilon(events(case), case["delta"], interval=COARSE) + 1e-9
    assert epsilon(events(case), case["delta"], "prv") == pytest.approx(fine, abs=0.03)


@pytest.mark.parametrize("case", REFERENCE["calibration"], ids=lambda c: c["id"])
def test_calibration_reaches_the_target_from_below(case: dict):
    sigma = calibrate_sigma(case["q"], case["steps"], case["epsilon"], case["delta"])
    assert case["tight"][0] <= sigma <= case["tight"][1]
    assert epsilon([Event("poisson", case["q"], sigma, case["steps"])], case["delta"]) <= case["epsilon"]


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
@pytest.mark.parametrize(
    ("event", "delta", "expected"),
    [
        (Event("poisson", 0.1, 1.0, 0), 1e-5, 0.0),
        (Event("poisson", 0.0, 1.0, 10), 1e-5, 0.0),
        (Event("poisson", 0.1, 0.0, 10), 1e-5, math.inf),
        (Event("poisson", 0.1, 1.0, 10), 1.0, 0.0),
        (Event("poisson", 0.1, 1.0, 10), 0.0, math.inf),
        (Event("poisson", 0.1, 0.0, 0), 0.0, 0.0),
    ],
)
def test_edge_cases_have_answers(accountant, event: Event, delta: float, expected: float):
    assert epsilon([event], delta, accountant) == expected
    assert epsilon([], delta, accountant) == 0.0


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
def test_huge_sigma_is_small_finite_and_never_negative(accountant):
    for sigma in (1e3, 1e7, 1e12):
        assert 0 <= epsilon([Event("full", 1.0, sigma, 3)], 1e-5, accountant) < 0.05


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 20), (0.5, 1), (8.0, 100)])
def test_full_batches_match_the_closed_form_for_both_relations(sigma: float, steps: int):
    for relation, factor in (("add_remove", 1), ("replace_one", 2)):
        found = epsilon([Event("full", 1.0, sigma, steps)], 1e-5, relation=relation)
        assert found == pytest.approx(gaussian_epsilon(factor * math.sqrt(steps) / sigma, 1e-5), rel=2e-3)


def test_replacing_a_record_under_sampling_costs_more_than_removing_one_and_every_accountant_says_so():
    """RDP and PRV have no analysis of it of their own and count it as removal at half the noise, which is above PLD."""
    event, delta = [Event("poisson", 0.2, 2.0, 4)], 1e-5
    removed = epsilon(event, delta, interval=1e-3)
    replaced = epsilon(event, delta, relation="replace_one", interval=1e-3)
    assert replaced > 1.2 * removed
    for accountant in ("rdp", "prv"):
        halved = epsilon([Event("poisson", 0.2, 1.0, 4)], delta, accountant)
        assert epsilon(event, delta, accountant, relation="replace_one") == pytest.approx(halved, rel=1e-9)
        assert halved >= replaced


def test_only_poisson_is_amplified_and_unknown_samplers_are_refused():
    poisson = epsilon([Event("poisson", 0.01, 1.0, 200)], 1e-5)
    assert (
        epsilon([Event("fixed_wor", 0.01, 1.0, 200)], 1e-5)
        == epsilon([Event("full", 1.0, 0.5, 200)], 1e-5)
        > 20 * poisson
    )
    shuffled = epsilon([Event("shuffle", 0.01, 1.0, 200)], 1e-5)
    assert shuffled == pytest.approx(gaussian_epsilon(math.sqrt(2 * 5), 1e-5), rel=1e-6)
    assert shuffled > 5 * poisson
    with pytest.raises(PrivacyError, match="sampler must be one of"):
        Event("weighted", 0.1, 1.0, 1)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_fixed_size_batch_is_covered_even_where_adding_a_record_displaces_another(n: int):
    """All n records pull by +C, the added one by −C: n of n + 1 times it displaces one of them, which moves the sum by
    2C.
    """
    z = np.linspace(-40, 40, 400_001)
    without, displaced = norm.pdf(z, n), norm.pdf(z, n - 2)  # batches of n, σ = C = 1

    def delta_of(eps: float) -> float:
        added = (without + n * displaced) / (n + 1)
        return float(np.maximum(added - math.exp(eps) * without, 0).sum() * (z[1] - z[0]))

    truth = brentq(lambda e: delta_of(e) - 1e-5, 0, 30)
    assert truth > 2 * gaussian_epsilon(1.0, 1e-5), "sensitivity C would not cover it"
    for q in (n / n, n / (n + 1)):
        assert truth <= epsilon([Event("fixed_wor", q, 1.0, 1)], 1e-5)


def test_the_reference_lower_bound_of_fixed_size_sampling_is_respected():
    """n = 6, batches of 3, σ = 4, 100 steps, δ = 0.01: at least 8.719426, which is above 8.24, the value of full
    batches.
    """
    assert epsilon([Event("fixed_wor", 0.5, 4.0, 100)], 0.01) >= 8.719426


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(0, 5))
def test_shuffle_counts_at_least_the_batches_that_a_record_is_in(n: int, size: int, steps: int, seed: int):
    batches = fixed_batches(n, size, steps, np.random.default_rng(seed))
    most = max(sum(i in batch for batch in batches) for i in range(n))
    charged = epsilon([Event("shuffle", min(1.0, size / n), 1.0, steps)], 1e-5, relation="replace_one")
    assert charged >= epsilon([Event("full", 1.0, 1.0, most)], 1e-5, relation="replace_one")


@pytest.mark.parametrize("sigma", [0.3, 0.05, 0.01, 1e-3])
def test_one_sampled_step_with_little_noise_matches_its_closed_form(sigma: float):
    """T = 1: ε(δ) = ln(1 + q·(exp(ε'(δ/q)) − 1)) with ε' of the plain Gaussian.

    Neither hangs, nor eats memory, nor overflows.
    """
    plain = accounting.epsilon([Event("full", 1.0, sigma, 1)], 1e-4)
    truth = plain + math.log(0.1) + (math.log1p(9 * math.exp(-plain)))
    pld, rdp, prv = (epsilon([Event("poisson", 0.1, sigma, 1)], 1e-5, a) for a in ("pld", "rdp", "prv"))
    assert truth * (1 - 1e-6) <= pld <= truth * 1.01
    assert pld <= rdp < 1.2 * truth
    assert truth * (1 - 1e-6) <= prv < 1.2 * truth


def test_almost_no_noise_promises_nothing_and_infinite_noise_costs_nothing():
    for accountant in ("pld", "rdp", "prv"):
        assert epsilon([Event("poisson", 0.1, 1e-200, 1)], 1e-5, accountant) == math.inf
        assert epsilon([Event("poisson", 0.1, math.inf, 5)], 1e-5, accountant) == 0.0
    one = [Event("poisson", 0.1, 1.0, 5)]
    assert epsilon([*one, Event("poisson", 0.1, math.inf, 5)], 1e-5, interval=COARSE) == epsilon(
        one, 1e-5, interval=COARSE
    )


@pytest.mark.parametrize(
    "event", [Event("poisson", 0.2, 0.3, 1000), Event("poisson", 0.5, 1.0, 100_000), Event("full", 1.0, 1.0, 100_000)]
)
def test_hardly_private_runs_have_a_finite_bound_in_seconds(event: Event):
    pld, rdp = (epsilon([event], 1e-5, a) for a in ("pld", "rdp"))
    assert 1016 < pld <= rdp < math.inf


@pytest.mark.parametrize("delta", [1e-20, 1e-300])
def test_delta_below_the_tails_that_pld_cuts_is_still_bounded(delta: float):
    assert 0 < epsilon([Event("poisson", 0.01, 1.0, 1000)], delta) < 100


def test_a_number_that_is_none_does_not_pass_for_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(accounting._ACCOUNTANTS, "pld", lambda *_: math.nan)
    assert epsilon([FEDSVD], 1e-5) == math.inf


@pytest.mark.parametrize(
    "bad", [{"q": -0.1}, {"q": 1.1}, {"sigma": -1.0}, {"steps": -1}, {"q": math.nan}, {"sigma": math.nan}]
)
def test_impossible_events_are_refused(bad: dict):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Event(**{"sampler": "poisson", "q": 0.1, "sigma": 1.0, "steps": 1, **bad})


@pytest.mark.parametrize("delta", [-1e-9, 1.1, math.nan])
def test_impossible_delta_is_refused(delta: float):
    with pytest.raises(ValueError, match="delta"):
        epsilon([FEDSVD], delta)


def test_equal_events_are_merged_and_order_does_not_matter():
    parts = [Event("poisson", 0.02, 0.9, 5), Event("poisson", 0.01, 1.1, 7)]
    assert epsilon(parts * 10, 1e-5, interval=COARSE) == epsilon(
        [Event("poisson", 0.01, 1.1, 70), Event("poisson", 0.02, 0.9, 50)], 1e-5, interval=COARSE
    )


@settings(max_examples=6, deadline=None)
@given(st.floats(0.005, 0.3), st.floats(0.6, 3.0), st.integers(1, 100))
def test_monotone_in_steps_rate_and_noise(q: float, sigma: float, steps: int):
    base = epsilon([Event("poisson", q, sigma, steps)], 1e-5, "rdp")
    assert epsilon([Event("poisson", q, sigma, steps + 10)], 1e-5, "rdp") >= base
    assert epsilon([Event("poisson", min(1.0, q * 1.2), sigma, steps)], 1e-5, "rdp") >= base
    assert epsilon([Event("poisson", q, sigma * 1.2, steps)], 1e-5, "rdp") <= base


def test_unreachable_targets_and_bad_arguments():
    with pytest.raises(PrivacyError, match="cannot be reached"):
        calibrate_sigma(1.0, 10**9, 1e-4, 1e-12)
    with pytest.raises(PrivacyError, match="use pld"):
        calibrate_sigma(0.01, 1000, 0.005, 1e-5, "prv")
    assert calibrate_sigma(1e-6, 1, 1.0, 1e-5) == pytest.approx(0.01), (
        "drawn with probability below δ: any noise will do"
    )
    for bad in ({"epsilon": 0.0}, {"delta": 0.0}, {"delta": 1.0}, {"q": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            calibrate_sigma(**{"q": 0.1, "steps": 10, "epsilon": 1.0, "delta": 1e-5, **bad})


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
@pytest.mark.parametrize(
    "event",
    [Event("poisson", 1e-9, 0.5, 2**53 - 1), Event("poisson", 0.5, 1.0, 2**53 - 1), Event("full", 1.0, 1.0, 2**53 - 1)],
)
def test_absurdly_many_steps_have_an_answer(accountant, event: Event):
    assert epsilon([event], 1e-5, accountant) > (1 if event.q < 1e-3 else 100)


def test_pld_never_exceeds_rdp_at_a_million_tiny_steps():
    event = Event("poisson", 1e-4, 2.0, 10**6)
    assert 0 < epsilon([event], 1e-5, "pld") <= epsilon([event], 1e-5, "rdp")
