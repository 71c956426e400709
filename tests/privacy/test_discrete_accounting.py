"""ε of Poisson-sampled discrete Gaussians: ten settings by another way, and the proof's claims, summed term by term."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from fedlab.privacy.accounting import DISCRETE, Event, epsilon, optimistic
from fedlab.privacy.audit.recompute import integer_epsilon, recompute
from fedlab.privacy.calibration import calibrate_sigma

# (q, σ, steps, δ): presets' sizes, few and many rounds, little and much noise, no sampling, a rate that is hardly any
SETTINGS = [
    (64 / 300, 1.2, 24, 1e-5),
    (0.05, 0.8, 50, 1e-5),
    (0.01, 0.6, 200, 1e-6),
    (0.001, 0.5, 1000, 1e-6),
    (0.3, 4.0, 100, 1e-5),
    (1.0, 5.0, 10, 1e-5),
    (0.5, 1.0, 1, 1e-3),
    (0.02, 20.0, 2000, 1e-8),
    (0.0001, 1.0, 100_000, 1e-9),
    (0.2, 0.35, 3, 1e-5),
]


def moment(q: mpmath.mpf, sigma: mpmath.mpf, order: int) -> mpmath.mpf:
    """E_Q[(P/Q)^α] of one step, by the binomial theorem with exact binomials."""
    terms = (
        mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp(k * (k - 1) / (2 * sigma**2))
        for k in range(order + 1)
    )
    return mpmath.fsum(terms)


def reference(q: float, sigma: float, steps: int, delta: float) -> float:
    """The least over integer orders of RDP converted as in Canonne, Kamath and Steinke (2020, proposition 12)."""
    with mpmath.workdps(40):
        best, since = mpmath.inf, 0
        for order in (*range(2, 130), *range(130, 1100, 10), *range(1100, 2100, 50)):
            rdp = steps * mpmath.log(moment(mpmath.mpf(q), mpmath.mpf(sigma), order)) / (order - 1)
            found = rdp + mpmath.log1p(mpmath.mpf(-1) / order) - (mpmath.log(delta) + mpmath.log(order)) / (order - 1)
            best, since = (found, 0) if found < best else (best, since + 1)
            if since > 12:  # it is convex in the order
                break
        return float(best)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_ten_settings_by_another_way(setting: tuple[float, float, int, float]):
    q, sigma, steps, delta = setting
    expected, event = reference(*setting), Event(DISCRETE, q, sigma, steps)
    assert epsilon([event], delta) == pytest.approx(expected, rel=2e-3)
    assert epsilon([event], delta) >= expected * (1 - 1e-9) - 1e-9 or expected < 0.05  # its orders are fewer
    sampled, rho2 = ([(q, sigma, steps)], 0.0) if q < 1 else ([], steps / sigma**2)
    assert integer_epsilon(sampled, rho2, delta) == pytest.approx(expected, rel=2e-3)


def test_the_audit_says_the_same_and_tells_the_optimistic_figure():
    event = Event(DISCRETE, 0.05, 0.8, 50)
    found = recompute([event], 1e-5)
    assert found.pld == found.rdp == found.prv == pytest.approx(epsilon([event], 1e-5), rel=2e-3)
    assert found.optimistic == pytest.approx(optimistic([event], 1e-5), rel=1e-3)
    assert found.optimistic < found.pld < found.unamplified
    mixed = recompute([event, Event("poisson", 0.05, 0.8, 50), Event("full", 1.0, 9.0, 1)], 1e-5)
    assert mixed.pld > recompute([Event(DISCRETE, 0.05, 0.8, 100)], 1e-5).pld
    assert recompute([Event(DISCRETE, 0.05, 0.0, 1)], 1e-5).pld == math.inf
    assert recompute([event], 0.0).pld == math.inf


def divergences(shift: int, std: float, q: float, order: int) -> tuple[float, float]:
    """(D_α(mixture ‖ centred), D_α(centred ‖ mixture)) of discrete Gaussians on the line, summed over the integers."""
    with mpmath.workdps(40):
        values = range(-int(40 * std) - order * shift, int(40 * std) + order * shift + 1)
        centred = [mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * std**2)) for x in values]
        moved = [mpmath.exp(-(mpmath.mpf(x - shift) ** 2) / (2 * std**2)) for x in values]
        total = mpmath.fsum(centred)
        mixed = [(1 - q) * a + q * b for a, b in zip(centred, moved, strict=True)]
        added = mpmath.fsum(m**order * c ** (1 - order) for m, c in zip(mixed, centred, strict=True))
        removed = mpmath.fsum(c**order * m ** (1 - order) for m, c in zip(mixed, centred, strict=True))
        return tuple(float(mpmath.log(each / total) / (order - 1)) for each in (added, removed))


@pytest.mark.parametrize(("shift", "std", "q"), [(1, 0.8, 0.2), (2, 1.7, 0.5), (3, 2.0, 0.05)])
@pytest.mark.parametrize("order", [2, 3, 7])
def test_the_moments_of_discrete_noise_are_those_of_continuous_noise(shift: int, std: float, q: float, order: int):
    added, removed = divergences(shift, std, q, order)
    with mpmath.workdps(40):
        continuous = float(mpmath.log(moment(mpmath.mpf(q), mpmath.mpf(std) / shift, order)) / (order - 1))
    assert added == pytest.approx(continuous, rel=1e-12)
    assert removed <= added * (1 + 1e-12)


def test_one_step_keeps_what_its_epsilon_promises():
    """δ of the discrete mechanism itself, by its probabilities, in both directions."""
    for shift, std, q, delta in ((1, 0.7, 0.3, 1e-4), (4, 4.0, 0.6, 1e-6)):
        bound = epsilon([Event(DISCRETE, q, std / shift, 1)], delta)
        x = np.arange(-60 * shift, 61 * shift)
        centred, moved = np.exp(-(x**2) / (2 * std**2)), np.exp(-((x - shift) ** 2) / (2 * std**2))
        p, m = centred / centred.sum(), ((1 - q) * centred + q * moved) / centred.sum()
        for one, other in ((p, m), (m, p)):
            assert np.maximum(one - math.exp(bound) * other, 0).sum() <= delta


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
def test_one_discrete_event_turns_every_accountant_to_integer_orders(accountant: str):
    beside = [Event("poisson", 0.1, 1.0, 10), Event("full", 1.0, 5.0, 1)]
    spent = [*beside, Event(DISCRETE, 0.1, 1.0, 10)]
    assert epsilon(spent, 1e-5, accountant) == epsilon(spent, 1e-5, "rdp")
    assert epsilon(spent, 1e-5) >= epsilon([*beside, Event("poisson", 0.1, 1.0, 10)], 1e-5, "rdp")


def test_edges():
    assert epsilon([Event(DISCRETE, 0.0, 1.0, 10)], 1e-5) == 0
    assert epsilon([Event(DISCRETE, 0.1, 1.0, 0)], 1e-5) == 0
    assert epsilon([Event(DISCRETE, 0.1, 0.0, 1)], 1e-5) == math.inf
    assert epsilon([Event(DISCRETE, 0.1, 1.0, 1)], 0.0) == math.inf
    assert epsilon([Event(DISCRETE, 0.1, 1.0, 1)], 1.0) == 0
    assert math.isfinite(epsilon([Event(DISCRETE, 0.1, 1e7, 1)], 1e-5))
    for relation in ("add_remove", "replace_one"):
        assert epsilon([Event(DISCRETE, 0.1, 1.0, 9)], 1e-5, relation=relation) > 0


def test_replacement_is_not_amplified():
    assert epsilon([Event(DISCRETE, 0.1, 2.0, 9)], 1e-5, relation="replace_one") == pytest.approx(
        epsilon([Event(DISCRETE, 1.0, 1.0, 9)], 1e-5)
    )


def test_calibration_reaches_the_target_by_integer_orders():
    sigma = calibrate_sigma(0.2, 24, 6.0, 1e-5, "rdp", sampler=DISCRETE)
    assert 5.97 < epsilon([Event(DISCRETE, 0.2, sigma, 24)], 1e-5) <= 6.0
    assert sigma > calibrate_sigma(0.2, 24, 6.0, 1e-5, "rdp") - 1e-3
