"""ε against reference values, against closed forms, and at the edges where libraries raise or lie."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedlab.errors import PrivacyError
from fedlab.privacy.accounting import COARSE, FINE, Event, calibrate_sigma, epsilon, group_epsilon, person_epsilon

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


def test_only_poisson_is_amplified_and_unknown_samplers_are_refused():
    poisson = epsilon([Event("poisson", 0.01, 1.0, 200)], 1e-5)
    assert epsilon([Event("fixed_wor", 0.01, 1.0, 200)], 1e-5) == epsilon([Event("full", 1.0, 1.0, 200)], 1e-5) > 20 * poisson
    assert epsilon([Event("shuffle", 0.01, 1.0, 200)], 1e-5) == epsilon([Event("full", 1.0, 1.0, 2)], 1e-5) > 5 * poisson
    with pytest.raises(PrivacyError, match="sampler must be one of"):
        Event("weighted", 0.1, 1.0, 1)


@pytest.mark.parametrize("bad", [{"q": -0.1}, {"q": 1.1}, {"sigma": -1.0}, {"steps": -1}, {"q": math.nan}, {"sigma": math.nan}])
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


def test_a_person_with_several_records_in_one_client():
    """Mixture-of-Gaussians values: far above ε for one record, not k·ε."""
    for records, expected in ((1, 4.018), (2, 8.269)):
        assert group_epsilon(FEDSVD, 1e-5, records) == pytest.approx(expected, rel=1e-3)


def test_a_person_in_several_clients_adds_up():
    clients = [[FEDSVD], [Event("poisson", 64 / 3000, 1.0, 300)], [Event("poisson", 64 / 300, 2.0, 200)]]
    assert person_epsilon(clients[:2], 1e-5) == pytest.approx(4.5126, rel=1e-3)
    assert person_epsilon(clients, 1e-5) == pytest.approx(9.1831, rel=1e-3)


def test_unreachable_targets_and_bad_arguments():
    with pytest.raises(PrivacyError, match="cannot be reached"):
        calibrate_sigma(1.0, 10**9, 1e-4, 1e-12)
    for bad in ({"epsilon": 0.0}, {"delta": 0.0}, {"delta": 1.0}, {"q": 2.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            calibrate_sigma(**{"q": 0.1, "steps": 10, "epsilon": 1.0, "delta": 1e-5, **bad})
