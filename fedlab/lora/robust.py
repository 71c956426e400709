"""Aggregation that a minority of clients cannot steer: robust replacements of the weighted mean, pure functions of the
updates.

``rule(updates, weights, **options) -> State``. Norms and distances are those of a client's *whole* update (all its
tensors, one vector); the median and the trimmed mean look at one coordinate at a time. Everything is computed in
float64, in client order, and returned in the dtype that came in; permuting the clients changes no bit. n counts the
clients of positive weight (the others are dropped first), f the clients that may send anything. Memory: 8·n·d bytes for
updates of d values (Bulyan: about five times that).

Breakdown: how many clients may be arbitrary while the result stays bounded by the others. Where a rule counts *weight*,
a client that inflates its size gains votes: use equal weights unless the sizes are verified. No rule is private and
none sees through secure aggregation; the privacy accounting of a mean (sensitivity 2C/n) does not hold for them.

Every rule raises ValueError if there is no client, a weight is negative, not finite or all are 0, names, shapes or
dtypes differ, or an update holds NaN, infinities or values beyond 1e150: callers exclude such a client with
``check_update``. One matrix out of factor pairs, instead of averaged factors: ``fedlab.lora.robust_product``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedlab.lora.rows import Rows, mean_within, row_norms, stack_updates, weighted_median
from fedlab.lora.state import State


def coordinate_median(updates: Mapping[str, State], weights: Mapping[str, float]) -> State:
    """Per coordinate, the weighted median: the midpoint of all x with weight(values < x) ≤ ½ and weight(values > x) ≤
    ½.

    Equal weights give the usual median, the mean of the two middle values where n is even. Breakdown: less than half of
    the weight; the result then lies between the smallest and the largest honest value of each coordinate. Source: Yin,
    Chen, Ramchandran and Bartlett 2018 (arXiv 1803.01498), unweighted there.
    """
    rows = stack_updates(updates, weights)
    return rows.state(weighted_median(rows.values, rows.weights))


def trimmed_mean(updates: Mapping[str, State], weights: Mapping[str, float], *, trim: float) -> State:
    """Per coordinate, drop the ⌊trim·n⌋ smallest and as many largest values, then the weighted mean of the rest.

    Breakdown: ⌊trim·n⌋ clients whatever their weights; the result then lies within the honest range of each coordinate.
    Source: Yin et al. 2018 (arXiv 1803.01498), unweighted there. trim in [0, 0.5); 0 is the weighted mean. Raises
    ValueError outside that range, and if trim > 0 but trim·n < 1: nothing would be trimmed, which would look like a
    defence and be none.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be in [0, 0.5), got {trim}: it is the share of clients dropped at each end")
    rows = stack_updates(updates, weights)
    n = len(rows.clients)
    cut = min(math.floor(trim * n + 1e-9), (n - 1) // 2)
    if trim > 0 and cut == 0:
        raise ValueError(
            f"trim = {trim} of {n} clients drops none of them: bring at least {max(3, math.ceil(1 / trim))} clients, "
            f"or raise trim to {1 / n:.3g} (3 clients or more), or state trim = 0"
        )
    if cut == 0:
        return rows.state(mean_within(rows.values, rows.weights[:, None]))
    values, order = torch.sort(rows.values, dim=0, stable=True)
    return rows.state(mean_within(values[cut : n - cut], rows.weights[order][cut : n - cut]))


def krum(updates: Mapping[str, State], weights: Mapping[str, float], *, byzantine: int) -> State:
    """The one update whose n − f − 2 nearest others are nearest: argmin_i Σ_{j near i} ‖u_i − u_j‖², the first client
    of equals.

    Breakdown: f = byzantine clients, n ≥ 2f + 3. The result is a client's own update, bit for bit; weights only say who
    takes part. Source: Blanchard, El Mhamdi, Guerraoui and Stainer 2017 (NeurIPS, "Machine Learning with Adversaries").
    Raises ValueError for f < 0 or too few clients.
    """
    rows = stack_updates(updates, weights)
    chosen = _krum_order(rows, byzantine)[0]
    return rows.state(rows.values[chosen])


def multi_krum(
    updates: Mapping[str, State], weights: Mapping[str, float], *, byzantine: int, keep: int | None = None
) -> State:
    """Weighted mean of the ``keep`` updates with the best Krum scores (scored once). keep = 1 is Krum.

    Breakdown: f = byzantine clients, n ≥ 2f + 3, keep in [1, n − f]; default n − f − 2. Of two scores that are equal
    the earlier client wins. Source: Blanchard et al. 2017, unweighted there. Raises ValueError for f < 0, too few
    clients, or keep out of range.
    """
    rows = stack_updates(updates, weights)
    n = len(rows.clients)
    order = _krum_order(rows, byzantine)
    keep = n - byzantine - 2 if keep is None else keep
    if not 1 <= keep <= n - byzantine:
        raise ValueError(
            f"keep = {keep} must be in [1, n − byzantine] = [1, {n - byzantine}]: of {n} clients {byzantine} may be"
            " hostile; lower keep"
        )
    chosen = sorted(order[:keep])
    return rows.state(mean_within(rows.values[chosen], rows.weights[chosen, None]))


def bulyan(updates: Mapping[str, State], weights: Mapping[str, float], *, byzantine: int) -> State:
    """Choose θ = n − 2f updates by repeated Krum, then per coordinate the weighted mean of the β = θ − 2f nearest to
    their median.

    A pass of Krum over the n' updates that are left sums over the n' − f − 2 nearest (at least one). The last passes
    therefore can choose hostile updates, at most f of θ ≥ 2f + 3; the second step is what bounds them: per coordinate
    the result is no further from the median of the chosen than the furthest honest value is. Breakdown: f = byzantine
    clients, n ≥ 4f + 3; f = 0 is the weighted mean. Source: El Mhamdi, Guerraoui and Rouault 2018 (arXiv 1802.07927),
    unweighted there. Raises ValueError for f < 0 or too few clients.
    """
    rows = stack_updates(updates, weights)
    n = len(rows.clients)
    _enough(n, byzantine, 4)
    squares = _square_distances(rows.values)
    left = list(range(n))
    chosen: list[int] = []
    while len(chosen) < n - 2 * byzantine:
        near = min(max(len(left) - byzantine - 2, 1), len(left) - 1)
        best = left[_scores(squares[left][:, left], near)[0]]
        left.remove(best)
        chosen.append(best)
    chosen.sort()
    values, own = rows.values[chosen], rows.weights[chosen]
    middle = weighted_median(values, torch.ones_like(own))
    nearest = torch.sort((values - middle).abs(), dim=0, stable=True).indices[: n - 4 * byzantine]
    nearest = torch.sort(nearest, dim=0).values
    return rows.state(mean_within(torch.gather(values, 0, nearest), own[nearest]))


def geometric_median(
    updates: Mapping[str, State],
    weights: Mapping[str, float],
    *,
    iterations: int = 200,
    tolerance: float = 1e-6,
    smoothing: float = 1e-6,
) -> State:
    """argmin_z Σ_k w_k ‖z − u_k‖ by Weiszfeld's iteration z ← Σ β_k u_k / Σ β_k, β_k = w_k / max(ν, ‖z − u_k‖).

    Breakdown: less than half of the weight. For hostile weight share a, the distance from the result to any honest
    centre is at most 2(1 − a)/(1 − 2a) times the largest distance of an honest update from it. The result lies in the
    convex hull of the updates. Source: Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning"
    (arXiv 1912.13445). Three things differ from that paper: the start is the coordinate median rather than the mean; ν
    is relative, smoothing × the weighted median distance to that start; and the iteration ends once a step is below
    tolerance × the harmonic mean of the distances. The paper's tests against the mean, an absolute ν and the loss all
    move with the size of the attack.

    Raises ValueError for iterations < 1, tolerance < 0 or smoothing ≤ 0. Not reaching the tolerance is no error: every
    iterate is a weighted mean with bounded outliers, and the paper stops after 3 to 5.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}; 5 is rough, 200 the default")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}; 0 runs all iterations")
    if not 0 < smoothing < math.inf:
        raise ValueError(f"smoothing must be > 0 and finite, got {smoothing}; 1e-6 is the default")
    rows = stack_updates(updates, weights)
    point = weighted_median(rows.values, rows.weights)
    distances = row_norms(rows.values - point)
    floor = smoothing * weighted_median(distances, rows.weights)
    if floor == 0:  # more than half of the weight lies in one point, which then is the geometric median
        return rows.state(point)
    for _ in range(iterations):
        pull = rows.weights / distances.clamp(min=floor)
        moved = mean_within(rows.values, pull[:, None])
        step = row_norms((moved - point)[None])[0]
        point = moved
        distances = row_norms(rows.values - point)
        if step <= tolerance / pull.sum():
            break
    return rows.state(point)


def norm_bounded_mean(
    updates: Mapping[str, State], weights: Mapping[str, float], *, bound: float | None = None
) -> State:
    """Σ w_k·min(1, bound/‖u_k‖)·u_k: each whole update scaled down to at most ``bound``, then the weighted mean.

    bound None: the weighted median of the norms, which follows training and breaks down at half of the weight.
    Breakdown: with an honest bound never unbounded, yet *biased*: a hostile share a of the weight moves the result by
    up to 2·a·bound, in any direction it likes. Cheap, and enough against scaling; no defence against sign flips.
    Source: Sun, Kairouz, Suresh and McMahan 2019 (arXiv 1911.07963). Raises ValueError unless 0 < bound < ∞.
    """
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(f"bound must be > 0 and finite, got {bound}; None takes the median norm")
    rows = stack_updates(updates, weights)
    norms = row_norms(rows.values)
    limit = weighted_median(norms, rows.weights) if bound is None else torch.tensor(bound, dtype=torch.float64)
    factors = torch.where(norms > limit, limit / norms, torch.ones_like(norms))
    return rows.state(mean_within(rows.values * factors[:, None], rows.weights[:, None]))


RULES: dict[str, Callable[..., State]] = {
    "bulyan": bulyan,
    "coordinate_median": coordinate_median,
    "geometric_median": geometric_median,
    "krum": krum,
    "multi_krum": multi_krum,
    "norm_bounded_mean": norm_bounded_mean,
    "trimmed_mean": trimmed_mean,
}


def _square_distances(values: Tensor) -> Tensor:
    """‖u_i − u_j‖² [n, n], from differences: the Gram matrix would lose the honest ones beside an outlier."""
    return torch.stack([row_norms(values - row) for row in values]).square()


def _scores(squares: Tensor, near: int) -> list[int]:
    """Positions from the best Krum score to the worst: sums of the ``near`` smallest distances to others."""
    others = squares.clone().fill_diagonal_(math.inf)
    scores = torch.sort(others, dim=1).values[:, :near].sum(1)
    order: list[int] = torch.sort(scores, stable=True).indices.tolist()
    return order


def _krum_order(rows: Rows, byzantine: int) -> list[int]:
    n = len(rows.clients)
    _enough(n, byzantine, 2)
    return _scores(_square_distances(rows.values), n - byzantine - 2)


def _enough(n: int, byzantine: int, factor: int) -> None:
    """n ≥ factor·f + 3, or ValueError."""
    if byzantine < 0:
        raise ValueError(f"byzantine must be >= 0, got {byzantine}: it is the number of clients that may be hostile")
    if n < factor * byzantine + 3:
        most = (n - 3) // factor
        fix = f"lower byzantine to at most {most} or bring" if most >= 0 else "bring"
        raise ValueError(
            f"byzantine = {byzantine} needs n >= {factor}·{byzantine} + 3 clients, got {n}: {fix}"
            f" {factor * byzantine + 3}"
        )
