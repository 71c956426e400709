"""ε recomputed on the libraries: against reference values, against the other implementation, and at the edges where
libraries fail.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlab.privacy.accounting import Event, epsilon
from fedlab.privacy.audit.recompute import Recomputed, _compose, gaussian_epsilon, recompute

REFERENCE = json.loads((Path(__file__).parents[1] / "reference_epsilon.json").read_text())
EDGES = [0.0, 5e-324, 1e-12, 1e-3, 0.3, 1 - 1e-16, 1.0]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c["id"], marks=[] if i % 6 == 0 else pytest.mark.slow)
        for i, c in enumerate(REFERENCE["epsilon"])
    ],
)
def test_reference_values(case: dict):
    found = recompute([Event("poisson", q, sigma, steps) for q, sigma, steps in case["mechanism"]], case["delta"])
    assert case["never_below"] <= found.pld <= case["tight"][1]
    assert case["epsilon"] * (1 - 1e-4) <= found.pld
    assert found.pld <= found.rdp * (1 + 1e-6) + 1e-9
    assert found.rdp <= case["rdp"][1] * 1.001
    if not found.replaced:
        assert abs(found.prv - found.pld) <= 0.03 + 0.03 * found.pld
    assert found.unamplified >= found.pld * (1 - 1e-6)


@pytest.mark.parametrize(
    "events",
    [
        [Event("poisson", 0.02, 1.0, 500)],
        [Event("poisson", 0.02, 1.0, 500), Event("poisson", 0.1, 2.0, 50), Event("poisson", 0.02, 1.0, 30)],
        [Event("full", 1.0, 2.0, 10)],
        [Event("fixed_wor", 0.1, 8.0, 60)],
        [Event("shuffle", 0.3, 4.0, 10), Event("shuffle", 0.3, 4.0, 1)],
        [Event("poisson", 0.02, 1.0, 50), Event("shuffle", 0.25, 9.0, 10), Event("full", 0.5, 9.0, 3)],
        [Event("poisson", 0.1, 0.05, 20)],
        [Event("poisson", 0.1, 1e7, 20)],
    ],
)
@pytest.mark.parametrize("delta", [1e-5, 1e-2])
def test_two_implementations_agree_within_what_the_audit_tolerates(events: list[Event], delta: float):
    claimed, found = epsilon(events, delta), recompute(events, delta)
    assert found.pld * (1 - 1e-4) - 1e-6 <= claimed <= found.ceiling * 1.02 + 1e-3
    assert found.rdp == pytest.approx(epsilon(events, delta, "rdp"), rel=1e-6, abs=1e-9)


def test_samplers_count_as_the_page_says():
    for times, event in (
        (4 * 7, Event("fixed_wor", 0.1, 3.0, 7)),
        (5 * 4, Event("shuffle", 0.3, 3.0, 10)),
        (9, Event("full", 0.1, 3.0, 9)),
    ):
        assert recompute([event], 1e-5).pld == pytest.approx(gaussian_epsilon(math.sqrt(times) / 3, 1e-5), rel=1e-12)
    full = recompute([Event("full", 1.0, 1.0, 100)], 1e-5)
    poisson = recompute([Event("poisson", 0.01, 1.0, 100)], 1e-5)
    assert poisson.unamplified == full.pld > 20 * poisson.pld


def test_the_closed_form():
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377178, abs=1e-5)
    assert gaussian_epsilon(0.0, 1e-5) == 0 == gaussian_epsilon(1e-9, 0.1)
    assert gaussian_epsilon(1e9, 1e-5) == pytest.approx(5e17, rel=1e-3)
    assert gaussian_epsilon(1e200, 1e-5) == math.inf == gaussian_epsilon(1.0, 0.0)


@pytest.mark.parametrize(
    ("events", "delta", "expected"),
    [
        ([], 1e-5, 0.0),
        ([], 0.0, 0.0),
        ([Event("poisson", 0.0, 0.0, 10)], 0.0, 0.0),
        ([Event("poisson", 0.1, 0.0, 0)], 1e-5, 0.0),
        ([Event("poisson", 0.1, 0.0, 1)], 1e-5, math.inf),
        ([Event("poisson", 0.1, 1e-4, 1), Event("full", 1.0, 5.0, 1)], 1e-5, math.inf),
        ([Event("poisson", 0.1, 1.0, 1)], 0.0, math.inf),
        ([Event("poisson", 0.1, 0.0, 1)], 1.0, 0.0),
    ],
)
def test_edges(events: list[Event], delta: float, expected: float):
    found = recompute(events, delta)
    assert (found.pld, found.rdp, found.prv) == (expected,) * 3


def legal(found: Recomputed) -> bool:
    return all(value >= 0 for value in (found.pld, found.rdp, found.prv, found.unamplified))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            Event,
            st.sampled_from(["fixed_wor", "shuffle", "full", "poisson"]),
            st.sampled_from(EDGES),
            st.sampled_from([0.0, 1e-300, 1e-3, 0.02, 1.0, 1e7, 1e300]),
            st.sampled_from([0, 1, 7, 1000, 2**53 - 1]),
        ),
        max_size=3,
    ),
    st.sampled_from([0.0, 1e-300, 1e-5, 0.5, 1.0]),
)
def test_any_legal_ledger_has_an_answer(events: list[Event], delta: float):
    assert legal(recompute(events, delta))


def test_an_accountant_that_gives_up_is_replaced_and_named():
    found = recompute([Event("poisson", 0.1, 0.02, 5)], 1e-5)
    assert found.replaced == ("prv",)
    assert found.prv == found.rdp
    found = recompute([Event("poisson", 1e-9, 0.5, 2**53 - 1)], 1e-5)
    assert found.replaced == ("pld", "prv")
    assert found.pld == found.rdp < math.inf


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["poisson", "fixed_wor", "shuffle", "full"]),
    st.floats(0.001, 1.0),
    st.floats(0.6, 8.0),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from([1e-7, 1e-5, 1e-2]),
)
def test_monotone_in_steps_and_pld_below_rdp(sampler, q: float, sigma: float, steps: int, more: int, delta: float):
    first, second = (recompute([Event(sampler, q, sigma, n)], delta) for n in (steps, steps + more))
    for found in (first, second):
        assert found.pld <= found.rdp * (1 + 1e-6) + 1e-9
        assert found.pld <= found.unamplified * (1 + 1e-6) + 1e-6
    assert first.pld <= second.pld + 1e-9
    assert first.rdp <= second.rdp + 1e-9
    split = recompute([Event(sampler, q, sigma, steps), Event(sampler, q, sigma, more)], delta)
    assert split.pld >= second.pld - 1e-9 if sampler == "shuffle" else split == second


@pytest.mark.slow
def test_a_hundred_rounds_of_twenty_clients_take_well_under_a_minute():
    _compose.cache_clear()
    began = time.perf_counter()
    for i in range(20):
        assert legal(recompute([Event("poisson", 0.005 + 0.001 * i, 0.7 + 0.05 * i, 50)] * 100, 1e-5))
    seconds = time.perf_counter() - began
    print(f"100 rounds x 20 clients x 50 steps: {seconds:.1f} s")
    assert seconds < 60
