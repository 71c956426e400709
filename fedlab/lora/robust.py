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
``check_update``. ``robust_low_rank`` recovers one matrix from factor pairs instead of averaging factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedlab.lora.state import State
from fedlab.lora.svd import refactorize
from fedlab.seeds import client_order

LARGEST = 1e150  # squares of what is larger overflow float64


def coordinate_median(updates: Mapping[str, State], weights: Mapping[str, float]) -> State:
    """Per coordinate, the weighted median: the midpoint of all x with weight(values < x) ≤ ½ and weight(values > x) ≤
    ½.

    Equal weights give the usual median, the mean of the two middle values where n is even. Breakdown: less than half of
    the weight; the result then lies between the smallest and the largest honest value of each coordinate. Source: Yin,
    Chen, Ramchandran and Bartlett 2018 (arXiv 1803.01498), unweighted there.
    """
    rows = _rows(updates, weights)
    return rows.state(_weighted_median(rows.values, rows.weights))


def trimmed_mean(updates: Mapping[str, State], weights: Mapping[str, float], *, trim: float) -> State:
    """Per coordinate, drop the ⌊trim·n⌋ smallest and as many largest values, then the weighted mean of the rest.

    Breakdown: ⌊trim·n⌋ clients whatever their weights; the result then lies within the honest range of each coordinate.
    Source: Yin et al. 2018 (arXiv 1803.01498), unweighted there. trim in [0, 0.5); 0 is the weighted mean. Raises
    ValueError outside that range, and if trim > 0 but trim·n < 1: nothing would be trimmed, which would look like a
    defence and be none.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be in [0, 0.5), got {trim}: it is the share of clients dropped at each end")
    rows = _rows(updates, weights)
    n = len(rows.clients)
    cut = min(math.floor(trim * n + 1e-9), (n - 1) // 2)
    if trim > 0 and cut == 0:
        raise ValueError(
            f"trim = {trim} of {n} clients drops none of them: bring at least {max(3, math.ceil(1 / trim))} clients, "
            f"or raise trim to {1 / n:.3g} (3 clients or more), or state trim = 0"
        )
    if cut == 0:
        return rows.state(_mean(rows.values, rows.weights[:, None]))
    values, order = torch.sort(rows.values, dim=0, stable=True)
    return rows.state(_mean(values[cut : n - cut], rows.weights[order][cut : n - cut]))


def krum(updates: Mapping[str, State], weights: Mapping[str, float], *, byzantine: int) -> State:
    """The one update whose n − f − 2 nearest others are nearest: argmin_i Σ_{j near i} ‖u_i − u_j‖², the first client
    of equals.

    Breakdown: f = byzantine clients, n ≥ 2f + 3. The result is a client's own update, bit for bit; weights only say who
    takes part. Source: Blanchard, El Mhamdi, Guerraoui and Stainer 2017 (NeurIPS, "Machine Learning with Adversaries").
    Raises ValueError for f < 0 or too few clients.
    """
    rows = _rows(updates, weights)
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
    rows = _rows(updates, weights)
    n = len(rows.clients)
    order = _krum_order(rows, byzantine)
    keep = n - byzantine - 2 if keep is None else keep
    if not 1 <= keep <= n - byzantine:
        raise ValueError(
            f"keep = {keep} must be in [1, n − byzantine] = [1, {n - byzantine}]: of {n} clients {byzantine} may be"
            " hostile; lower keep"
        )
    chosen = sorted(order[:keep])
    return rows.state(_mean(rows.values[chosen], rows.weights[chosen, None]))


def bulyan(updates: Mapping[str, State], weights: Mapping[str, float], *, byzantine: int) -> State:
    """Choose θ = n − 2f updates by repeated Krum, then per coordinate the weighted mean of the β = θ − 2f nearest to
    their median.

    A pass of Krum over the n' updates that are left sums over the n' − f − 2 nearest (at least one). The last passes
    therefore can choose hostile updates, at most f of θ ≥ 2f + 3; the second step is what bounds them: per coordinate
    the result is no further from the median of the chosen than the furthest honest value is. Breakdown: f = byzantine
    clients, n ≥ 4f + 3; f = 0 is the weighted mean. Source: El Mhamdi, Guerraoui and Rouault 2018 (arXiv 1802.07927),
    unweighted there. Raises ValueError for f < 0 or too few clients.
    """
    rows = _rows(updates, weights)
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
    middle = _weighted_median(values, torch.ones_like(own))
    nearest = torch.sort((values - middle).abs(), dim=0, stable=True).indices[: n - 4 * byzantine]
    nearest = torch.sort(nearest, dim=0).values
    return rows.state(_mean(torch.gather(values, 0, nearest), own[nearest]))


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
    rows = _rows(updates, weights)
    point = _weighted_median(rows.values, rows.weights)
    distances = _norms(rows.values - point)
    floor = smoothing * _weighted_median(distances, rows.weights)
    if floor == 0:  # more than half of the weight lies in one point, which then is the geometric median
        return rows.state(point)
    for _ in range(iterations):
        pull = rows.weights / distances.clamp(min=floor)
        moved = _mean(rows.values, pull[:, None])
        step = _norms((moved - point)[None])[0]
        point = moved
        distances = _norms(rows.values - point)
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
    rows = _rows(updates, weights)
    norms = _norms(rows.values)
    limit = _weighted_median(norms, rows.weights) if bound is None else torch.tensor(bound, dtype=torch.float64)
    factors = torch.where(norms > limit, limit / norms, torch.ones_like(norms))
    return rows.state(_mean(rows.values * factors[:, None], rows.weights[:, None]))


RULES: dict[str, Callable[..., State]] = {
    "bulyan": bulyan,
    "coordinate_median": coordinate_median,
    "geometric_median": geometric_median,
    "krum": krum,
    "multi_krum": multi_krum,
    "norm_bounded_mean": norm_bounded_mean,
    "trimmed_mean": trimmed_mean,
}


def robust_low_rank(
    factors: Sequence[tuple[Tensor, Tensor]],
    rank: int,
    *,
    weights: Sequence[float] | None = None,
    iterations: int = 2000,
    step: float = 0.5,
    init: float = 1e-2,
    tolerance: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """One matrix of rank ≤ ``rank`` from K copies B_k·A_k, a minority of which may be anything: argmin_{U,V} Σ_k w_k
    ‖U·Vᵀ − B_k·A_k‖_F.

    The sub-gradient method on the factors from a small start, after Ma and Fattahi 2022 (arXiv 2202.08788): with G =
    Σ_k w_k (X − X_k)/‖X − X_k‖_F, (U, V) ← (U − η·G·V, V − η·Gᵀ·U), from init × the balanced root of −G(0) truncated to
    the rank. The small start lets strong directions grow first and makes a rank that is too large harmless. η_t = step
    × the weighted median of the ‖X_t − X_k‖, in units where the median ‖X_k‖ is 1: it shrinks with the *honest*
    residuals, linearly, where the loss itself stays up for the outliers.

    The paper's loss is ℓ1 over scalar measurements. Here the unit that lies is a client, so the residuals are not
    squared *per client* and are Frobenius norms within one. That is also what makes compact coordinates exact: with
    thin QRs [B_1 … B_K] = P·R_B and [A_1ᵀ … A_Kᵀ] = Q·R_A, every X_k and the minimiser are P·(·)·Qᵀ, Frobenius norms do
    not see P and Q, and the m×n matrix is never formed (an iteration costs O((K r)² rank)). An entry-wise ℓ1 would
    change under the rotation and spread a sparse corruption over all coordinates; a client that corrupts few entries is
    outvoted here as a whole. The paper's theorem (PSD matrices, Sign-RIP measurements) does not cover this loss; the
    tests are the evidence. Breakdown: less than half of the weight, as any spatial median. Equal honest copies are
    recovered exactly; honest copies that differ by s leave an error of order s, unlike a mean's s/√K.

    Args:
        factors: (B_k [m, r_k], A_k [r_k, n]); ranks may differ. The order is the caller's to fix (client order): it
        decides the last bits. rank: in [1, min(m, n)]. weights: ≥ 0, default equal. step: in (0, 1]. init: in (0, 1).
        iterations ≥ 1. tolerance ≥ 0: stop once
            a step moves (U, V) by less than this share.

    Returns B [m, rank], A [rank, n] as ``refactorize`` gives them (orthonormal rows in A), float32 unless the input is
    float64. If more than half of the weight sent zero matrices, B is zero. Raises ValueError for no copy, misfitting
    shapes, unusable weights or options, a rank out of range, NaN or infinite factors (with the position of the copy).
    """
    if not (0 < step <= 1 and 0 < init < 1):
        raise ValueError(
            f"step and init must be in (0, 1] and (0, 1), got {step} and {init}; the defaults are 0.5 and 0.01"
        )
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}; 0 runs all iterations")
    share = _copies(factors, rank, weights)
    m, n = factors[0][0].shape[0], factors[0][1].shape[1]
    dtype = torch.promote_types(factors[0][0].dtype, factors[0][1].dtype)
    P, R_B = torch.linalg.qr(torch.cat([B.double() for B, _ in factors], dim=1))  # [m, p], [p, Σ r_k]
    Q, R_A = torch.linalg.qr(torch.cat([A.double().mT for _, A in factors], dim=1))  # [n, q], [q, Σ r_k]
    owner = torch.block_diag(
        *(torch.ones(1, B.shape[1], dtype=torch.float64) for B, _ in factors)
    )  # [K, Σ r_k]: whose column
    own = owner.mT @ owner
    square = owner @ ((R_B.mT @ R_B) * (R_A.mT @ R_A) * own).sum(1)  # ‖X_k‖²
    norms = square.clamp(min=0).sqrt()
    unit = _weighted_median(norms, share)
    if unit == 0:
        zero = (torch.zeros(m, rank, dtype=dtype), torch.zeros(rank, n, dtype=dtype))
        return refactorize(*zero)
    R_B, R_A, square, norms = R_B / unit.sqrt(), R_A / unit.sqrt(), square / unit**2, norms / unit
    pull = torch.where(norms > 0, share / norms, torch.zeros_like(norms))
    left, size, right = torch.linalg.svd((R_B * (pull @ owner)) @ R_A.mT, full_matrices=False)
    inner = min(rank, len(size))
    U, V = (init * basis[:, :inner] * size[:inner].sqrt() for basis in (left, right.mT))
    for _ in range(iterations):
        M, N = R_B.mT @ U, R_A.mT @ V  # [Σ r_k, rank]
        UU, VV = U.mT @ U, V.mT @ V
        residuals = (
            (square + (UU * VV).sum() - 2 * (owner @ (M * N).sum(1))).clamp(min=1e-16).sqrt()
        )  # 1e-8: rounding of ‖·‖²
        pull = share / residuals
        eta = step * _weighted_median(residuals, share)
        dU = eta * (pull.sum() * U @ VV - R_B @ ((pull @ owner)[:, None] * N))
        dV = eta * (pull.sum() * V @ UU - R_A @ ((pull @ owner)[:, None] * M))
        U, V = U - dU, V - dV
        if dU.square().sum() + dV.square().sum() <= tolerance**2 * (U.square().sum() + V.square().sum()):
            break
    B, A = refactorize(P @ U * unit, (Q @ V).mT, rank)
    return (B, A) if dtype == torch.float64 else (B.float(), A.float())


class _Rows(NamedTuple):
    """The updates as the rows of one matrix, in client order."""

    clients: list[str]
    values: Tensor  # [n, d] float64
    weights: Tensor  # [n] float64 > 0, sum 1
    like: State

    def state(self, vector: Tensor) -> State:
        """The vector [d] as tensors again, in the dtypes that came in."""
        parts = vector.split([self.like[name].numel() for name in sorted(self.like)])
        own = dict(zip(sorted(self.like), parts, strict=True))
        return {name: own[name].reshape(value.shape).to(value.dtype) for name, value in self.like.items()}


def _rows(updates: Mapping[str, State], weights: Mapping[str, float]) -> _Rows:
    everyone = sorted(updates, key=client_order)
    if not everyone:
        raise ValueError("no update to aggregate")
    if unknown := [c for c in everyone if c not in weights]:
        raise ValueError(f"{unknown[0]} has an update but no weight")
    for client in everyone:
        if not (math.isfinite(weights[client]) and weights[client] >= 0):
            raise ValueError(f"weight of {client} must be finite and >= 0, got {weights[client]}")
    clients = [c for c in everyone if weights[c] > 0]
    if not clients:
        raise ValueError("all weights are 0: there is nothing to aggregate; give at least one client a positive weight")
    like = updates[clients[0]]
    rows = []
    for client in clients:
        update = updates[client]
        if odd := update.keys() ^ like.keys():
            raise ValueError(f"{client} and {clients[0]} differ in {sorted(odd)[0]!r}")
        for name, value in update.items():
            if value.shape != like[name].shape or value.dtype != like[name].dtype:
                raise ValueError(
                    f"{client}: {name} is {value.dtype} {tuple(value.shape)}, want {like[name].dtype}"
                    f" {tuple(like[name].shape)}"
                )
            if not _usable(value, LARGEST):
                raise ValueError(
                    f"{client}: {name} holds NaN, infinite or huge values; exclude the client first (see check_update)"
                )
        rows.append(torch.cat([update[name].detach().double().reshape(-1) for name in sorted(like)]))
    total = math.fsum(weights[c] for c in clients)
    return _Rows(
        clients, torch.stack(rows), torch.tensor([weights[c] / total for c in clients], dtype=torch.float64), like
    )


def _usable(value: Tensor, largest: float) -> bool:
    return bool(
        (value.double().abs() <= largest).all()
    )  # a float32 comparison would take 1e150 for infinity; NaN is False


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Σ w·v / Σ w over the first dimension, kept within the values' range, which rounding could leave."""
    mean = (values * weights).sum(0) / weights.expand_as(values).sum(0)
    return mean.clamp(values.min(0).values, values.max(0).values)


def _weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Over the first dimension; weights [n]. Midpoint of the lower and the upper weighted median."""
    ordered, order = torch.sort(values, dim=0, stable=True)
    below = weights[order].cumsum(0)
    half, slack = 0.5 * below[-1], 1e-12 * below[-1]  # sums of equal weights must find their exact half
    lower, upper = (below < half - slack).sum(0, keepdim=True), (below <= half + slack).sum(0, keepdim=True)
    result: Tensor = (0.5 * (ordered.gather(0, lower) + ordered.gather(0, upper))).squeeze(0)
    return result


def _norms(values: Tensor) -> Tensor:
    result: Tensor = torch.linalg.vector_norm(values, dim=1)
    return result


def _square_distances(values: Tensor) -> Tensor:
    """‖u_i − u_j‖² [n, n], from differences: the Gram matrix would lose the honest ones beside an outlier."""
    return torch.stack([_norms(values - row) for row in values]).square()


def _scores(squares: Tensor, near: int) -> list[int]:
    """Positions from the best Krum score to the worst: sums of the ``near`` smallest distances to others."""
    others = squares.clone().fill_diagonal_(math.inf)
    scores = torch.sort(others, dim=1).values[:, :near].sum(1)
    order: list[int] = torch.sort(scores, stable=True).indices.tolist()
    return order


def _krum_order(rows: _Rows, byzantine: int) -> list[int]:
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


def _copies(factors: Sequence[tuple[Tensor, Tensor]], rank: int, weights: Sequence[float] | None) -> Tensor:
    """Check the factor pairs; the weights as shares that sum to 1."""
    if not factors:
        raise ValueError("no factor pair to recover a matrix from")
    m, n = factors[0][0].shape[0], factors[0][1].shape[-1]
    for k, (B, A) in enumerate(factors):
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0] or (B.shape[0], A.shape[1]) != (m, n):
            raise ValueError(
                f"copy {k}: B {tuple(B.shape)} and A {tuple(A.shape)} do not fit: want [{m}, r] and [r, {n}]"
            )
        if not (_usable(B, LARGEST**0.5) and _usable(A, LARGEST**0.5)):
            raise ValueError(f"copy {k} holds NaN, infinite or huge values; exclude it first (see check_update)")
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank = {rank} must be in [1, {min(m, n)}]: a {m}×{n} matrix has no more directions")
    own = [1.0] * len(factors) if weights is None else list(weights)
    if len(own) != len(factors) or not all(math.isfinite(w) and w >= 0 for w in own) or not math.fsum(own) > 0:
        raise ValueError(f"weights must be {len(factors)} finite numbers >= 0, not all 0, got {own}")
    return torch.tensor(own, dtype=torch.float64) / math.fsum(own)
