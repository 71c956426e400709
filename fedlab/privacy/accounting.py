"""From what happened to ε: events in, numbers out. Nothing here draws, clips or trains.

The accountants are libraries': dp-accounting's PLD (rigorous upper bound, the reported number) and RDP (cheap, valid as
an online filter), and Opacus' PRV (upper bound, a second opinion). The chain truth ≤ PLD ≤ RDP holds
(``tests/privacy/test_accounting.py``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, Literal

from fedlab._validate import non_negative, probability
from fedlab.errors import PrivacyError

Sampler = Literal["poisson", "poisson_discrete", "fixed_wor", "shuffle", "full"]
Accountant = Literal["pld", "rdp", "prv"]
Relation = Literal["add_remove", "replace_one"]
SAMPLERS = ("poisson", "poisson_discrete", "fixed_wor", "shuffle", "full")
DISCRETE: Sampler = "poisson_discrete"  # Poisson batches, discrete Gaussian noise on a grid
FINE = 1e-4  # PLD grid of a reported number; a coarser grid gives a slightly larger upper bound, sooner
COARSE = 1e-3
LEAST_SIGMA = 1e-3  # below it nothing is promised
MOST_SIGMA = 1e6  # above it amplification is not worth a grid
MANY_STEPS = 20_000  # from here on the grid's surplus may exceed what RDP gives away: the smaller of both bounds counts
TOO_MANY_STEPS = 10_000_000  # a PLD of so many compositions would exhaust memory: RDP alone
# of RDP under discrete Gaussian noise
INTEGER_ORDERS = (*range(2, 65), *range(68, 129, 4), *range(144, 257, 16), 320, 384, 512, 768, 1024, 2048)
GRID_POINTS = 2**18  # at most, per composed PLD: a grid is made coarser rather than memory exhausted


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
            raise PrivacyError(
                f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}; an unknown one is not"
                " accounted for"
            )
        probability(q=self.q)
        non_negative(sigma=self.sigma)
        non_negative(steps=self.steps)


def epsilon(
    events: Sequence[Event],
    delta: float,
    accountant: Accountant = "pld",
    relation: Relation = "add_remove",
    interval: float = FINE,
) -> float:
    """ε of all events together.

    Formal guarantee: it is an upper bound by every accountant.

    Only ``poisson`` and ``poisson_discrete`` are amplified by sampling. Where batches have a fixed size, a record that
    leaves is replaced by another, so even add/remove moves a sum by 2C. ``fixed_wor`` counts as if every step saw the
    record: sensitivity 2C per step. ``shuffle`` has it in one batch per pass of at least ⌊1/q⌋ steps; its place is
    taken by the last record of the pass, which leaves the last batch: √(2² + 1²)·C per started pass (2C for
    replacement). That assumes equally many batches per pass on both sides, i.e. a public number of records.

    Where one of the events is ``poisson_discrete``, every accountant answers with RDP at integer orders over all
    events: there every moment of the discrete Gaussian is that of the continuous one (docs/privacy.md), and nothing of
    the kind holds for a PLD. Under replacement it counts as if every step saw the record.

    | case | ε |
    |---|---|
    | no steps, or q = 0 | 0 |
    | σ = 0 (or below 10⁻³) with steps and q > 0 | inf |
    | δ = 0 | inf (unless nothing was released) |
    | δ = 1 | 0 |

    Args:
        events: what was released, in any order.
        delta: δ in [0, 1].
        accountant: "pld", "rdp" or "prv".
        relation: neighbours differ by adding or removing one record (zeroing it out counts the same), or by replacing
            one, which doubles the sensitivity.
        interval: the PLD grid.

    Returns:
        ε ≥ 0; inf where nothing is promised.

    Raises:
        ValueError: an argument is out of range.
    """
    probability(delta=delta)
    if accountant not in _ACCOUNTANTS:
        raise ValueError(f"accountant must be one of {', '.join(_ACCOUNTANTS)}, got {accountant!r}")
    if relation not in ("add_remove", "replace_one"):
        raise ValueError(f"relation must be add_remove or replace_one, got {relation!r}")
    work = _merge(events, relation)
    if work.nothing or delta == 1:
        return 0.0
    if delta == 0 or math.isinf(work.mu):
        return math.inf
    account = _rdp if work.discrete else _ACCOUNTANTS[accountant]
    result = account(work, delta, relation, interval)
    return math.inf if math.isnan(result) else max(0.0, result)  # a number that is none must not pass for 0


def optimistic(events: Sequence[Event], delta: float) -> float:
    """ε by PLD as if all noise were continuous: what a finer proof for discrete noise could give, and no guarantee."""
    plain = [Event("poisson", e.q, e.sigma, e.steps) if e.sampler == DISCRETE else e for e in events]
    return epsilon(plain, delta)


@dataclass(frozen=True)
class _Work:
    """Events merged: Poisson steps per (q, σ), and the one Gaussian mechanism that all unamplified releases together
    amount to.
    """

    poisson: tuple[tuple[float, float, int], ...]  # (q, σ, steps), 0 < q < 1, in a fixed order
    # sensitivity / noise of that Gaussian, sqrt(Σ steps·(s/σ)²): Gaussian releases compose exactly; inf if one has no
    # noise
    mu: float
    discrete: bool = False  # one of them has discrete Gaussian noise: RDP at integer orders is what holds

    @property
    def nothing(self) -> bool:
        return not self.poisson and self.mu == 0


def _merge(events: Sequence[Event], relation: Relation) -> _Work:
    """Equal mechanisms with their steps added; those that release nothing left out."""
    poisson: dict[tuple[float, float], int] = {}
    squared = {
        "poisson": 1.0,
        DISCRETE: 1.0,
        "full": 1.0,
        "fixed_wor": 4.0,
        "shuffle": 5.0,
    }  # (sensitivity / C)²; see ``epsilon``
    unamplified: list[float] = []
    discrete = False
    for event in events:
        if event.steps == 0 or event.q == 0:
            continue
        discrete = discrete or event.sampler == DISCRETE
        amplified = event.sampler == "poisson" or (event.sampler == DISCRETE and relation == "add_remove")
        if amplified and event.q < 1 and LEAST_SIGMA <= event.sigma <= MOST_SIGMA:
            key = event.q, event.sigma
            poisson[key] = poisson.get(key, 0) + event.steps
            continue
        releases = (
            math.ceil(event.steps / math.floor(min(1 / event.q, event.steps)))
            if event.sampler == "shuffle"
            else event.steps
        )
        s2 = 4.0 if relation == "replace_one" else squared[event.sampler]
        unamplified.append(releases * s2 / event.sigma / event.sigma if event.sigma >= LEAST_SIGMA else math.inf)
    return _Work(
        tuple((q, sigma, steps) for (q, sigma), steps in sorted(poisson.items())),
        math.sqrt(math.fsum(unamplified)),
        discrete,
    )


def _loss_range(sigma: float, sensitivity: float) -> float:
    """Largest privacy loss of one Gaussian release that a PLD keeps: noise up to 8 σ."""
    mu = sensitivity / sigma
    return mu * mu / 2 + 8 * mu


def _coarsening(loss_range: float, interval: float) -> int:
    """Power of two by which to widen the grid, so that few grids are in use and their base PLDs are shared."""
    return 1 << max(0, math.ceil(math.log2(loss_range / (interval * GRID_POINTS))))


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


@lru_cache(maxsize=4096)
def _pld(work: _Work, delta: float, relation: Relation, interval: float) -> float:
    if not work.poisson:
        from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

        # Exact (Balle and Wang, 2018) up to the root's tolerance.
        return float(get_epsilon_gaussian(1 / work.mu, delta)) * (1 + 1e-9)
    steps = sum(steps for _, _, steps in work.poisson)
    bound = _rdp(work, delta, relation, interval) if steps > MANY_STEPS else math.inf
    if steps > TOO_MANY_STEPS:
        return bound
    grid = interval * _coarsening(_widest(work, relation), interval)
    parts = [_base_pld(q, sigma, relation, grid).self_compose(steps) for q, sigma, steps in work.poisson]
    if work.mu > 0:
        parts.append(_base_pld(1.0, 1 / work.mu, "add_remove", grid))
    composed = reduce(lambda left, right: left.compose(right), parts)
    result = min(bound, float(composed.get_epsilon_for_delta(delta)))
    # Infinite: δ is below the tails that a PLD cuts.
    return result if math.isfinite(result) else _rdp(work, delta, relation, interval)


def _widest(work: _Work, relation: Relation) -> float:
    """How far the losses reach, alone and composed, that a PLD or PRV has to represent; a few RDP orders are enough to
    tell.
    """
    with _silent_absl():
        composed = _rdp_curve(work, relation, (2, 4, 8, 16, 32, 64)).get_epsilon(1e-15)
    return max(
        [
            float(composed),
            _loss_range(1.0, work.mu),
            *(_loss_range(_relative(s, relation), 1.0) for _, s, _ in work.poisson),
        ]
    )


def _rdp(work: _Work, delta: float, relation: Relation, interval: float) -> float:
    try:
        with _silent_absl():
            orders = INTEGER_ORDERS if work.discrete else None
            return float(_rdp_curve(work, relation, orders).get_epsilon(delta))
    except OverflowError:  # more steps than a double can count
        return math.inf


def _rdp_curve(work: _Work, relation: Relation, orders: tuple[int, ...] | None = None) -> Any:
    """The composed RDP.

    Replacement under Poisson sampling is bounded by addition and removal at twice the sensitivity.
    """
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders, NeighboringRelation.ADD_OR_REMOVE_ONE)
    with _silent_absl():
        for q, sigma, steps in work.poisson:
            accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(_relative(sigma, relation))), steps)
        if work.mu > 0:
            accountant.compose(GaussianDpEvent(1 / work.mu))
    return accountant


@contextmanager
def _silent_absl() -> Iterator[None]:
    """dp-accounting announces through absl every low order that it drops, as it always does.

    And absl calls ``logging.basicConfig()`` where nobody has: from then on the process would say each line of every
    logger again. So the root logger has a handler here, which does nothing.
    """
    absl, root, nothing = logging.getLogger("absl"), logging.getLogger(), logging.NullHandler()
    level = absl.level
    root.addHandler(nothing)
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)
        root.removeHandler(nothing)


def _prv(work: _Work, delta: float, relation: Relation, interval: float) -> float:
    from opacus.accountants import PRVAccountant

    steps = sum(steps for _, _, steps in work.poisson)
    # Opacus takes exp of losses in float64; past 700 that overflows, and its ε falls below the truth. Its grid grows
    # with √steps.
    if _widest(work, relation) > 500 or steps > TOO_MANY_STEPS:
        return _rdp(work, delta, relation, interval)
    accountant = PRVAccountant()
    accountant.history = [(_relative(sigma, relation), q, steps) for q, sigma, steps in work.poisson]
    if work.mu > 0:
        accountant.history.append((1 / work.mu, 1.0, 1))
    return float(accountant.get_epsilon(delta))


def _relative(sigma: float, relation: Relation) -> float:
    """Noise relative to the sensitivity: replacing a record can move the sum by 2C."""
    return sigma if relation == "add_remove" else sigma / 2


_ACCOUNTANTS: dict[str, Callable[[_Work, float, Relation, float], float]] = {"pld": _pld, "rdp": _rdp, "prv": _prv}
