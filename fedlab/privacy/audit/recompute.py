"""ε of a list of events by three accountants, written on the libraries alone: dp-accounting's PLD and RDP, and Opacus'
PRV.

Of ``fedlab.privacy.accounting`` only ``Event`` is used, which says what the fields mean; how its samplers are bounded
is decided here a second time. Every number is an upper bound. For any legal events and δ the result is in [0, inf],
never NaN, never an exception.

| sampler | counted as |
|---|---|
| ``poisson`` | subsampled Gaussian (q, σ), add/remove |
| ``poisson_discrete`` | the same with discrete noise: RDP at integer orders, over all events, by a sum of its own |
| ``full`` | Gaussian, sensitivity C per step |
| ``fixed_wor`` | Gaussian, sensitivity 2C per step: the record in a place moves another out of it |
| ``shuffle`` | Gaussian, sensitivity √5·C per started pass of ⌊1/q⌋ steps |
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedlab.privacy.accounting import Event

ORDERS = (*range(2, 129), *range(132, 257, 4), *range(272, 513, 16), 640, 768, 1024, 2048)  # of discrete noise
GRID = 1e-4
MOST_POINTS = 2**19  # per PLD; the grid is widened beyond
PRV_LOSS, PRV_POINTS = (
    300.0,
    2**22,
)  # Opacus exponentiates losses in float64, and its mesh grows with √steps: not beyond these
MANY_STEPS, MOST_STEPS = (
    10**5,
    2 * 10**6,
)  # beyond the one, the grid's surplus can pass RDP's; beyond the other, PLDs take too long
LITTLE_NOISE, MUCH_NOISE = 1e-3, 1e6  # σ below: nothing is promised; above: sampling is not worth a grid


@dataclass(frozen=True)
class Recomputed:
    """ε of one client's charges; ``replaced`` names the accountants that could not answer, for which the RDP number
    stands.

    ``ceiling`` is the largest number that an honest PLD could give: ``pld``, more where its grid's surplus shows.
    """

    pld: float
    rdp: float
    prv: float
    unamplified: float
    ceiling: float
    replaced: tuple[str, ...] = ()
    optimistic: float | None = None  # under discrete noise: PLD as if it were continuous, which guarantees nothing


@dataclass(frozen=True)
class _Spent:
    sampled: tuple[tuple[float, float, int], ...]  # (q, σ, steps), merged and sorted
    rho2: float  # Σ (sensitivity/σ)² of all unamplified Gaussians, which compose to one with this square
    discrete: bool = False  # some of the noise is discrete


def recompute(events: Iterable[Event], delta: float) -> Recomputed:
    """Everything together at ``delta``. Equal events are merged; results are cached.

    | case | ε |
    |---|---|
    | nothing charged, q = 0, or δ = 1 | 0 |
    | σ = 0 (or below 10⁻³), or δ = 0 | inf |
    """
    counts: Counter[tuple[str, float, float]] = Counter()
    steps: Counter[tuple[str, float, float]] = Counter()
    for event in events:
        if event.steps and event.q:
            steps[event.sampler, event.q, event.sigma] += event.steps
            counts[event.sampler, event.q, event.sigma] += event.steps if event.sampler != "shuffle" else _passes(event)
    sampled: list[tuple[float, float, int]] = []
    plain: list[float] = []
    everything: list[float] = []  # without amplification: never below what was counted
    for (sampler, q, sigma), times in counts.items():
        square = {"poisson": 1.0, "poisson_discrete": 1.0, "full": 1.0, "fixed_wor": 4.0, "shuffle": 5.0}[sampler]
        amount = times * square / sigma / sigma if sigma >= LITTLE_NOISE else math.inf
        everything.append(max(amount, steps[sampler, q, sigma] / sigma / sigma) if sigma >= LITTLE_NOISE else math.inf)
        if sampler in ("poisson", "poisson_discrete") and q < 1 and LITTLE_NOISE <= sigma <= MUCH_NOISE:
            sampled.append((q, sigma, times))
        else:
            plain.append(amount)
    discrete = any(sampler == "poisson_discrete" for sampler, _, _ in counts)
    spent = _Spent(_added(sampled), math.fsum(plain), discrete)
    return (_discrete if discrete else _compose)(spent, math.fsum(everything), delta)


def _added(sampled: Iterable[tuple[float, float, int]]) -> tuple[tuple[float, float, int], ...]:
    """Steps of equal (q, σ) added, whether their noise is discrete or not."""
    steps: Counter[tuple[float, float]] = Counter()
    for q, sigma, times in sampled:
        steps[q, sigma] += times
    return tuple(sorted((q, sigma, times) for (q, sigma), times in steps.items()))


def _passes(event: Event) -> int:
    """Started passes of ⌊1/q⌋ steps."""
    length = math.floor(min(1 / event.q, float(event.steps)))
    return -(-event.steps // length)


@lru_cache(maxsize=4096)
def _compose(spent: _Spent, everything: float, delta: float) -> Recomputed:
    if not (spent.sampled or spent.rho2) or delta >= 1:
        return Recomputed(0.0, 0.0, 0.0, 0.0, 0.0)
    unamplified = gaussian_epsilon(math.sqrt(everything), delta)
    if not delta > 0 or math.isinf(spent.rho2):
        return Recomputed(math.inf, math.inf, math.inf, unamplified, math.inf)
    rdp = _try(lambda: _rdp(spent, delta))
    if math.isnan(rdp):  # losses beyond every order: the closed form without sampling still holds
        rdp = unamplified
    pld, prv = _try(lambda: _pld(spent, delta)), _try(lambda: _prv(spent, delta))
    ceiling = math.inf if math.isnan(pld) else pld
    surplus = pld > rdp and (_steps(spent) > MANY_STEPS or _grid(spent) > GRID)
    replaced = [name for name, lost in (("pld", math.isnan(pld) or surplus), ("prv", math.isnan(prv))) if lost]
    return Recomputed(
        rdp if "pld" in replaced else pld, rdp, rdp if "prv" in replaced else prv, unamplified, ceiling, tuple(replaced)
    )


@lru_cache(maxsize=4096)
def _discrete(spent: _Spent, everything: float, delta: float) -> Recomputed:
    """One number for all accountants: RDP at integer orders, where discrete noise has the moments of continuous
    noise. The PLD of continuous noise is told beside it.
    """
    if not (spent.sampled or spent.rho2) or delta >= 1:
        return Recomputed(0.0, 0.0, 0.0, 0.0, 0.0)
    if not delta > 0 or math.isinf(spent.rho2):
        return Recomputed(math.inf, math.inf, math.inf, math.inf, math.inf)
    found = integer_epsilon(spent.sampled, spent.rho2, delta)
    plain = _try(lambda: _pld(_Spent(spent.sampled, spent.rho2), delta))
    without = integer_epsilon((), everything, delta)
    return Recomputed(found, found, found, without, found, ("pld", "prv"), None if math.isnan(plain) else plain)


def integer_epsilon(sampled: Iterable[tuple[float, float, int]], rho2: float, delta: float) -> float:
    """ε by RDP at integer orders, from the binomial sum of each moment (Mironov, Talwar and Zhang, 2019, section 3.3).

    Args:
        sampled: (q, σ, steps) of Poisson-sampled Gaussians, discrete or not.
        rho2: Σ (sensitivity/σ)² of the ones without sampling.
        delta: δ in (0, 1).
    """
    import numpy as np
    from scipy.special import gammaln, logsumexp

    least = math.inf
    for order in ORDERS:
        k = np.arange(order + 1)
        binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        rdp = order * rho2 / 2
        for q, sigma, times in sampled:
            terms = binomial + (order - k) * math.log1p(-q) + k * math.log(q) + k * (k - 1.0) / (2 * sigma * sigma)
            rdp += times * max(0.0, float(logsumexp(terms))) / (order - 1)
        found = rdp + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        least = min(least, found)
    return max(0.0, least)


def _steps(spent: _Spent) -> int:
    return sum(times for _, _, times in spent.sampled)


def _try(run: Callable[[], float]) -> float:
    """A library's number, or NaN where it fails or answers with none: they do at the edges, each at others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Opacus warns of its logarithms of zero, and of its orders
            value = float(run())
    except (ArithmeticError, ValueError, RuntimeError, MemoryError, IndexError):
        return math.nan
    return max(0.0, value) if math.isfinite(value) else math.nan


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least ε of one Gaussian mechanism with sensitivity/σ = mu (Balle and Wang, 2018), by bisection, rounded up by
    1e-9.
    """
    from scipy.special import log_ndtr

    if mu == 0 or delta >= 1:
        return 0.0
    if not delta > 0 or not math.isfinite(mu * mu):
        return math.inf

    def log_delta(eps: float) -> float:
        above, below = float(log_ndtr(mu / 2 - eps / mu)), eps + float(log_ndtr(-mu / 2 - eps / mu))
        return above + math.log(-math.expm1(below - above)) if below < above else -math.inf

    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # the bound from zero-concentrated DP
    if log_delta(0.0) <= math.log(delta):
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if log_delta(middle) > math.log(delta) else (low, middle)
        if high - low <= 1e-12 * high:
            break
    return high * (1 + 1e-9)


def _mechanisms(spent: _Spent) -> list[tuple[Any, int]]:
    """dp-accounting's events with their counts."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    events: list[tuple[Any, int]] = [
        (PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), times) for q, sigma, times in spent.sampled
    ]
    return [*events, (GaussianDpEvent(1 / math.sqrt(spent.rho2)), 1)] if spent.rho2 else events


def _rdp(spent: _Spent, delta: float) -> float:
    from dp_accounting.rdp import RdpAccountant

    logger, root, nothing = logging.getLogger("absl"), logging.getLogger(), logging.NullHandler()
    level = logger.level
    root.addHandler(nothing)  # absl would call logging.basicConfig()
    logger.setLevel(logging.ERROR)  # it announces each order that it drops
    try:
        accountant = RdpAccountant()
        for event, times in _mechanisms(spent):
            accountant.compose(event, times)
        return float(accountant.get_epsilon(delta))
    finally:
        logger.setLevel(level)
        root.removeHandler(nothing)


@lru_cache(maxsize=4096)
def _reach(spent: _Spent) -> float:
    """How far losses go, alone and composed, with any probability that matters."""
    single = [1 / sigma for _, sigma, _ in spent.sampled] + [math.sqrt(spent.rho2)]
    composed = _try(lambda: _rdp(spent, 1e-15))
    return max(math.inf if math.isnan(composed) else composed, *(mu * mu / 2 + 10 * mu for mu in single))


def _grid(spent: _Spent) -> float:
    """A power of two times GRID: wide enough for the PLD to fit. The bound stays a bound, with a larger surplus."""
    return (
        GRID * 2.0 ** max(0, math.ceil(math.log2(2 * _reach(spent) / (GRID * MOST_POINTS))))
        if math.isfinite(_reach(spent))
        else math.inf
    )


def _pld(spent: _Spent, delta: float) -> float:
    if not spent.sampled:
        return gaussian_epsilon(math.sqrt(spent.rho2), delta)
    from dp_accounting.pld import PLDAccountant

    if _steps(spent) > MOST_STEPS or math.isinf(_grid(spent)):
        return math.nan
    accountant = PLDAccountant(value_discretization_interval=_grid(spent))
    for event, times in _mechanisms(spent):
        accountant.compose(event, times)
    return float(accountant.get_epsilon(delta))


def _prv(spent: _Spent, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    steps = _steps(spent) + (spent.rho2 > 0)
    reach = _reach(spent)
    mesh = 0.01 / math.sqrt(steps * math.log(12000 / delta) / 2)
    if reach > PRV_LOSS or 2 * (reach + 3) / mesh > PRV_POINTS:
        return math.nan
    accountant = PRVAccountant()
    accountant.history = [(sigma, q, times) for q, sigma, times in spent.sampled]
    if spent.rho2:
        accountant.history.append((1 / math.sqrt(spent.rho2), 1.0, 1))
    return float(accountant.get_epsilon(delta))
