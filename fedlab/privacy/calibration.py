"""The noise multiplier that spends no more than an ε: a root search over the accountants."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from fedlab._validate import positive, probability
from fedlab.errors import Unreachable
from fedlab.privacy.accounting import COARSE, FINE, Accountant, Event, Sampler, epsilon

LOWEST, HIGHEST = math.log(1e-2), math.log(1e4)  # log σ between which is searched


def calibrate_sigma(
    q: float,
    steps: int,
    epsilon: float,
    delta: float,
    accountant: Accountant = "pld",
    beside: tuple[Event, ...] = (),
    also: tuple[tuple[float, int], ...] = (),
    sampler: Sampler = "poisson",
) -> float:
    """Smallest noise multiplier with which ``steps`` Poisson steps at rate q spend at most ε.

    Args:
        q: sampling rate in [0, 1].
        steps: number of steps.
        epsilon: most that may be spent, > 0.
        delta: δ in (0, 1).
        accountant: by which ε is counted.
        beside: events that are spent as well and count towards ε.
        also: further Poisson steps under the same σ, pairs (q, steps).
        sampler: "poisson", or "poisson_discrete" where the noise is a discrete Gaussian.

    Returns:
        σ, to about 5e-4 relative and never below the smallest; 0 if nothing is released.

    Raises:
        ValueError: ε ≤ 0 or δ outside (0, 1).
        Unreachable: no σ below 10⁴ suffices.
    """
    positive(epsilon=epsilon)
    probability(q=q)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if steps <= 0 or q == 0:
        return 0.0
    return _calibrate(((q, steps), *also), epsilon, delta, accountant, beside, sampler)


@lru_cache(maxsize=4096)
def _calibrate(
    parts: tuple[tuple[float, int], ...],
    target: float,
    delta: float,
    accountant: Accountant,
    beside: tuple[Event, ...],
    sampler: Sampler,
) -> float:
    from scipy.optimize import brentq

    def excess(log_sigma: float, by: Accountant = accountant, interval: float = COARSE) -> float:
        """log(ε/target): above 0 where more noise is needed."""
        own = [Event(sampler, q, math.exp(log_sigma), steps) for q, steps in parts]
        spent = epsilon([*own, *beside], delta, by, interval=interval)
        return math.log(max(spent, 1e-9) / target)

    steps = sum(count for _, count in parts)
    if sum(q * count for q, count in parts) <= delta:  # an example is drawn at all with probability at most δ
        return math.exp(LOWEST)
    if excess(HIGHEST, "rdp") > 0:
        least = target * math.exp(excess(HIGHEST, "rdp"))
        raise Unreachable(
            f"privacy.epsilon = {target:g} at delta = {delta:g} cannot be reached in {steps} steps at q ="
            f" {parts[0][0]:g}: with the most noise that is tried it is {least:.2g}; raise privacy.epsilon, or"
            " take fewer steps"
        )
    # RDP is cheap and never below PLD, so its σ bounds the search from above and keeps PLD away from absurdly small σ.
    by_rdp = excess(LOWEST, "rdp") > 0
    start = float(brentq(excess, LOWEST, HIGHEST, args=("rdp",), xtol=0.05)) + 0.06 if by_rdp else LOWEST
    bracket = _bracket(excess, start)
    if bracket is None:
        raise Unreachable(
            f"epsilon = {target:g} at delta = {delta:g} is below what the accountant {accountant!r} can resolve;"
            " use pld"
        )
    low, under, high, over = bracket
    if low == high:
        return math.exp(LOWEST)
    found = float(brentq(excess, low, high, xtol=2e-4))
    grid = COARSE
    if accountant == "pld" and (target < 1 or steps > 2000):
        grid = FINE  # there the coarse grid's surplus counts: a Newton step on the fine one
        found += excess(found, interval=grid) * (high - low) / (under - over) + 1e-4
    while excess(found, interval=grid) > 0:
        found += 2e-4
    return math.exp(found)


def _bracket(excess: Callable[[float], float], start: float) -> tuple[float, float, float, float] | None:
    """(low, excess there > 0, high, excess there ≤ 0) of log σ around the root, from a guess that is hardly too low.

    Both ends are LOWEST if even that suffices; None if HIGHEST does not.
    """
    high, width = start, 0.02
    while (over := excess(high)) > 0:  # only a rounding away: PLD <= RDP, and PRV's error is 0.01
        high += width
        width *= 2
        if high > HIGHEST:
            return None
    width = 0.1
    while (under := excess(low := max(LOWEST, high - width))) <= 0:
        if low == LOWEST:
            return low, under, low, under
        high, over, width = low, under, 2 * width
    return low, under, high, over
