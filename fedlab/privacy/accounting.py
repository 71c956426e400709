"""From what happened to ε: events in, numbers out. Nothing here draws, clips or trains.

The accountants are libraries': dp-accounting's PLD (rigorous upper bound, the reported number) and RDP (cheap, valid as an online
filter), and Opacus' PRV (upper bound, a second opinion). The chain truth ≤ PLD ≤ RDP holds (``tests/privacy/test_accounting.py``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fedlab._validate import non_negative, positive, probability
from fedlab.errors import PrivacyError

Sampler = Literal["poisson", "fixed_wor", "shuffle", "full"]
Accountant = Literal["pld", "rdp", "prv"]
Relation = Literal["add_remove", "replace_one"]
SAMPLERS = ("poisson", "fixed_wor", "shuffle", "full")
FINE = 1e-4  # PLD grid of a reported number; a coarser grid gives a slightly larger upper bound, sooner
COARSE = 1e-3


@dataclass(frozen=True)
class Event:
    """``steps`` releases of a clipped sum plus N(0, (σC)²), each over a batch drawn by ``sampler`` at rate ``q``.

    The meaning of these fields never changes: ledgers keep them for years.
    """

    sampler: Sampler
    q: float
    sigma: float
    steps: int

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise PrivacyError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}; an unknown one is not accounted for")
        probability(q=self.q)
        non_negative(sigma=self.sigma)
        non_negative(steps=self.steps)


def epsilon(
    events: Sequence[Event], delta: float, accountant: Accountant = "pld", relation: Relation = "add_remove", interval: float = FINE
) -> float:
    """ε ≥ 0 of all events together at ``delta``: an upper bound for every accountant; inf where nothing is promised.

    Only ``poisson`` is amplified by sampling. ``fixed_wor`` counts as if every step saw all records, ``shuffle`` as one unamplified
    release per started pass over the data: both are valid bounds, with and without knowledge of the order.

    | case | ε |
    |---|---|
    | no steps, or q = 0 | 0 |
    | σ = 0 with steps and q > 0 | inf |
    | δ = 0 | inf (unless nothing was released) |
    | δ = 1 | 0 |

    ``relation``: neighbours differ by adding or removing one record (zeroing it out counts the same), or by replacing one, which
    doubles the sensitivity. ``interval`` is the PLD grid. Raises ValueError for arguments out of range.
    """
    probability(delta=delta)
    if accountant not in _ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {', '.join(_ACCOUNTANTS)}, got {accountant!r}")
    if relation not in ("add_remove", "replace_one"):
        raise ValueError(f"relation must be add_remove or replace_one, got {relation!r}")
    merged = _merge(events)
    if not merged or delta == 1:
        return 0.0
    if delta == 0 or any(sigma == 0 for _, sigma, _ in merged):
        return math.inf
    if all(sigma > 1e6 for _, sigma, _ in merged):  # beyond every grid: the bound of one Gaussian with all steps' sensitivity
        merged = ((1.0, 1e6, math.ceil(sum(steps * (1e6 / sigma) ** 2 for _, sigma, steps in merged))),)
    result = _ACCOUNTANTS[accountant](merged, delta, relation, interval)
    return max(0.0, result)


def calibrate_sigma(q: float, steps: int, epsilon: float, delta: float, accountant: Accountant = "pld") -> float:
    """Smallest noise multiplier (to about 5e-4 relative, never below) with which ``steps`` Poisson steps at rate q spend at most ε.

    Raises ValueError for ε <= 0 or δ outside (0, 1), PrivacyError if no σ below 10⁴ suffices.
    """
    positive(epsilon=epsilon)
    probability(q=q)
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    if steps <= 0 or q == 0:
        return 0.0
    return _calibrate(q, steps, epsilon, delta, accountant)


@lru_cache(maxsize=4096)
def _calibrate(q: float, steps: int, target: float, delta: float, accountant: Accountant) -> float:
    from scipy.optimize import brentq

    # The coarse grid's surplus grows with the number of steps and matters more for a small ε.
    grid = COARSE if target >= 1 and steps <= 2000 else FINE

    def excess(log_sigma: float, by: Accountant) -> float:
        spent = epsilon([Event("poisson", q, math.exp(log_sigma), steps)], delta, by, interval=grid)
        return math.log(max(spent, 1e-9) / target)

    # RDP is cheap and never below PLD, so its σ bounds the search from above and keeps PLD away from absurdly small σ.
    lowest, highest = math.log(1e-2), math.log(1e4)
    if excess(highest, "rdp") > 0:
        raise PrivacyError(f"epsilon = {target:g} at delta = {delta:g} cannot be reached in {steps} steps at q = {q:g}")
    high = float(brentq(excess, lowest, highest, args=("rdp",), xtol=2e-4)) + 4e-4 if excess(lowest, "rdp") > 0 else lowest
    while excess(high, accountant) > 0:  # only a rounding away: PLD <= RDP, and PRV's error is 0.01
        high += 0.02
    low = high - 0.1
    while excess(low, accountant) <= 0:
        low, high = low - 0.2, low
        if low < lowest:
            return math.exp(high)
    found = float(brentq(excess, low, high, args=(accountant,), xtol=2e-4))
    while excess(found, accountant) > 0:
        found += 2e-4
    return math.exp(found)


def group_epsilon(event: Event, delta: float, records: int) -> float:
    """ε for a person with ``records`` examples in one client: all are added or removed together.

    A mixture of Gaussians with Binomial(k, q) sensitivity (PLD), which is exact for Poisson sampling and far below k·ε.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld
    from scipy.stats import binom

    positive(records=records)
    if event.steps == 0 or event.q == 0 or delta == 1:
        return 0.0
    if event.sigma == 0 or delta == 0:
        return math.inf
    if event.sampler != "poisson":
        q, sigma, steps = _effective(event)
        return epsilon([Event("full", q, sigma / records, steps)], delta)
    counts = list(range(records + 1))
    base = pld.from_mixture_gaussian_mechanism(
        event.sigma,
        [float(k) for k in counts],
        [float(p) for p in binom.pmf(counts, records, event.q)],
        value_discretization_interval=COARSE,
    )
    return max(0.0, float(base.self_compose(event.steps).get_epsilon_for_delta(delta)))


def person_epsilon(per_client: Sequence[Sequence[Event]], delta: float, accountant: Accountant = "pld") -> float:
    """ε for a person with one record in each of several clients: their events add up; the maximum over clients would be too small."""
    return epsilon([event for events in per_client for event in events], delta, accountant)


def _effective(event: Event) -> tuple[float, float, int]:
    """(q, σ, steps) of the Poisson mechanism that bounds an event."""
    if event.sampler == "poisson":
        return event.q, event.sigma, event.steps
    if event.sampler == "shuffle":  # a record is in one batch per pass; q·steps passes were started
        return 1.0, event.sigma, math.ceil(event.steps * event.q - 1e-9)
    return 1.0, event.sigma, event.steps


def _merge(events: Sequence[Event]) -> tuple[tuple[float, float, int], ...]:
    """Equal mechanisms with their steps added, in a fixed order; those that release nothing left out."""
    total: dict[tuple[float, float], int] = {}
    for event in events:
        q, sigma, steps = _effective(event)
        if event.q > 0 and steps > 0:
            total[q, sigma] = total.get((q, sigma), 0) + steps
    return tuple((q, sigma, steps) for (q, sigma), steps in sorted(total.items()))


Merged = tuple[tuple[float, float, int], ...]


@lru_cache(maxsize=64)
def _base_pld(q: float, sigma: float, relation: Relation, interval: float) -> Any:
    import dp_accounting
    from dp_accounting.pld import privacy_loss_distribution as pld

    relations = dp_accounting.NeighboringRelation
    return pld.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        value_discretization_interval=interval,
        neighboring_relation=relations.ADD_OR_REMOVE_ONE if relation == "add_remove" else relations.REPLACE_ONE,
    )


def _pld(merged: Merged, delta: float, relation: Relation, interval: float) -> float:
    composed: Any = None
    for q, sigma, steps in merged:
        part = _base_pld(q, sigma, relation, interval).self_compose(steps)
        composed = part if composed is None else composed.compose(part)
    return float(composed.get_epsilon_for_delta(delta))


def _rdp(merged: Merged, delta: float, relation: Relation, interval: float) -> float:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    logging.getLogger("absl").setLevel(logging.ERROR)  # it announces every low order that it drops, which is its normal course
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    for q, sigma, steps in merged:
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(_sensitivity(sigma, relation))), steps)
    return float(accountant.get_epsilon(delta))


def _prv(merged: Merged, delta: float, relation: Relation, interval: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(_sensitivity(sigma, relation), q, steps) for q, sigma, steps in merged]
    return float(accountant.get_epsilon(delta))


def _sensitivity(sigma: float, relation: Relation) -> float:
    """σ relative to the sensitivity: replacing a record can move the sum by 2C."""
    return sigma if relation == "add_remove" else sigma / 2


_ACCOUNTANTS: dict[str, Callable[[Merged, float, Relation, float], float]] = {"pld": _pld, "rdp": _rdp, "prv": _prv}
