"""Robust rules: each against slow loops in float64, the bits against every order, the result against clients that send
anything.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedlab.lora.average import weighted_mean
from fedlab.lora.robust import RULES
from fedlab.seeds import client_order

N, F = 11, 2
OPTIONS: dict[str, dict[str, float]] = {
    "bulyan": {"byzantine": F},
    "coordinate_median": {},
    "geometric_median": {},
    "krum": {"byzantine": F},
    "multi_krum": {"byzantine": F},
    "norm_bounded_mean": {},
    "trimmed_mean": {"trim": 0.2},
}
few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def draw(
    seed: int, clients: int = N, dtype: torch.dtype = torch.float32, centre: float = 1.0
) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        f"client-{i}": {
            "a.lora_B": (centre + torch.randn(3, 2, generator=g)).to(dtype),
            "head.w": (centre + torch.randn(2, generator=g)).to(dtype),
        }
        for i in range(clients)
    }


def draw_weights(seed: int, clients: int = N) -> dict[str, int]:
    return {f"client-{i}": int(w) for i, w in enumerate(np.random.default_rng(seed).integers(1, 6, clients))}


def equal(clients: int = N) -> dict[str, float]:
    return {f"client-{i}": 1.0 for i in range(clients)}


def flat(state: dict[str, torch.Tensor]) -> list[float]:
    return [x for name in sorted(state) for x in state[name].double().flatten().tolist()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# ---- slow references: plain lists, loops, exact fractions for weights


def mean_of(rows: list[list[float]], weights: list[float]) -> list[float]:
    return [
        math.fsum(w * row[j] for row, w in zip(rows, weights, strict=True)) / sum(weights) for j in range(len(rows[0]))
    ]


def median_of(column: list[float], weights: list[int]) -> float:
    def share(chosen: list[bool]) -> Fraction:
        return Fraction(sum(w for w, c in zip(weights, chosen, strict=True) if c), sum(weights))

    half = Fraction(1, 2)
    fit = [x for x in column if share([y < x for y in column]) <= half and share([y > x for y in column]) <= half]
    return (min(fit) + max(fit)) / 2


def slow_median(rows, weights):
    return [median_of([row[j] for row in rows], weights) for j in range(len(rows[0]))]


def slow_trimmed(rows, weights, trim):
    cut, result = int(Fraction(str(trim)) * len(rows)), []
    for j in range(len(rows[0])):
        pairs = sorted(zip([row[j] for row in rows], weights, strict=True))[cut : len(rows) - cut]
        result.append(sum(x * w for x, w in pairs) / sum(w for _, w in pairs))
    return result


def slow_ranking(rows, members, f):
    def score(i):
        squares = sorted(sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in members if j != i)
        return sum(squares[: max(len(members) - f - 2, 1)])

    return sorted(members, key=lambda i: (score(i), i))


def slow_krum(rows, weights, byzantine):
    return rows[slow_ranking(rows, range(len(rows)), byzantine)[0]]


def slow_multi_krum(rows, weights, byzantine):
    chosen = slow_ranking(rows, range(len(rows)), byzantine)[: len(rows) - byzantine - 2]
    return mean_of([rows[i] for i in chosen], [weights[i] for i in chosen])


def slow_bulyan(rows, weights, byzantine):
    left, chosen = list(range(len(rows))), []
    for _ in range(len(rows) - 2 * byzantine):
        chosen.append(slow_ranking(rows, left, byzantine)[0])
        left.remove(chosen[-1])
    result = []
    for j in range(len(rows[0])):
        middle = float(np.median([rows[i][j] for i in chosen]))
        best = sorted(chosen, key=lambda i: (abs(rows[i][j] - middle), i))[: len(chosen) - 2 * byzantine]
        result.append(sum(weights[i] * rows[i][j] for i in best) / sum(weights[i] for i in best))
    return result


def slow_geometric(rows, weights):
    point = mean_of(rows, weights)
    for _ in range(3000):
        pull = [w / max(math.dist(point, row), 1e-12) for row, w in zip(rows, weights, strict=True)]
        point = mean_of(rows, pull)
    return point


def slow_norm_bounded(rows, weights):
    norms = [math.hypot(*row) for row in rows]
    bound = median_of(norms, weights)
    return mean_of([[x * min(1.0, bound / norm) for x in row] for row, norm in zip(rows, norms, strict=True)], weights)


SLOW = {
    "bulyan": slow_bulyan,
    "coordinate_median": slow_median,
    "geometric_median": slow_geometric,
    "krum": slow_krum,
    "multi_krum": slow_multi_krum,
    "norm_bounded_mean": slow_norm_bounded,
    "trimmed_mean": slow_trimmed,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("seed", "clients"), [(0, 11), (1, 12), (2, 16)])
def test_rules_against_loops(name: str, seed: int, clients: int):
    updates = draw(seed, clients, torch.float64)
    for weights in (draw_weights(seed, clients), dict.fromkeys(updates, 1)):
        found = RULES[name](updates, weights, **OPTIONS[name])
        wanted = SLOW[name]([flat(u) for u in updates.values()], list(weights.values()), **OPTIONS[name])
        assert np.allclose(flat(found), wanted, rtol=0, atol=2e-5 if name == "geometric_median" else 1e-12)


def test_every_rule_is_tested():
    assert RULES.keys() == OPTIONS.keys() == SLOW.keys()


# ---- properties


@pytest.mark.parametrize("name", RULES)
@few
@given(seed=seeds)
def test_permuting_clients_and_names_changes_no_bit(name: str, seed: int):
    updates, weights = draw(seed), draw_weights(seed)
    wanted = RULES[name](updates, weights, **OPTIONS[name])
    order = np.random.default_rng(seed).permutation(N)
    shuffled = {f"client-{i}": dict(reversed(updates[f"client-{i}"].items())) for i in order}
    found = RULES[name](shuffled, dict(reversed(weights.items())), **OPTIONS[name])
    assert same(found, wanted)
    assert all(value.dtype == torch.float32 for value in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_equal_updates_are_returned_as_they_are(name: str, dtype: torch.dtype):
    one = draw(3, 1, dtype)["client-0"]
    found = RULES[name]({f"client-{i}": one for i in range(N)}, draw_weights(3), **OPTIONS[name])
    assert same(found, one)


@pytest.mark.parametrize("name", ["coordinate_median", "geometric_median", "norm_bounded_mean", "trimmed_mean"])
@few
@given(seed=seeds)
def test_one_client_is_itself(name: str, seed: int):
    updates = draw(seed, 1)
    assert same(
        RULES[name](updates, {"client-0": 0.3}, **({"trim": 0} if name == "trimmed_mean" else {})), updates["client-0"]
    )


@pytest.mark.parametrize("name", RULES)
def test_a_client_of_weight_zero_has_no_vote(name: str):
    updates, weights = draw(4), draw_weights(4)
    outsider = {n: torch.full_like(v, 1e6) for n, v in updates["client-0"].items()}
    found = RULES[name](updates | {"client-99": outsider}, weights | {"client-99": 0}, **OPTIONS[name])
    assert same(found, RULES[name](updates, weights, **OPTIONS[name]))


@pytest.mark.parametrize("name", RULES)
@few
@given(seed=seeds)
def test_result_lies_within_the_range_of_the_updates(name: str, seed: int):
    updates = draw(seed)
    found = np.array(flat(RULES[name](updates, draw_weights(seed), **OPTIONS[name])))
    rows = np.array([flat(u) for u in updates.values()])
    if name == "norm_bounded_mean":  # scaled updates: between the updates and zero
        rows = np.vstack([rows, 0 * rows[:1]])
    assert (rows.min(0) <= found).all()
    assert (found <= rows.max(0)).all()


def attacked(seed: int, attackers: int, together: bool) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    updates = draw(seed)
    hostile = [f"client-{i}" for i in np.random.default_rng(seed).permutation(N)[:attackers]]
    g = torch.Generator().manual_seed(seed + 1)
    for client in hostile:
        g = torch.Generator().manual_seed(seed + 1) if together else g
        updates[client] = {n: 1e6 * torch.randn(v.shape, generator=g).sign() for n, v in updates[client].items()}
    return updates, [c for c in updates if c not in hostile]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", RULES)
@few
@given(seed=seeds)
def test_attackers_at_a_million_do_not_move_the_result(name: str, together: bool, seed: int):
    most = {"coordinate_median": 5, "geometric_median": 4}.get(name, F)
    updates, honest = attacked(seed, most, together)
    found = RULES[name](updates, equal(), **OPTIONS[name])
    rows = np.array([flat(updates[c]) for c in honest])
    centre, point = rows.mean(0), np.array(flat(found))
    radius = max(np.linalg.norm(rows - centre, axis=1))
    assume(
        np.linalg.norm(np.array(flat(weighted_mean(updates, equal()))) - centre) > 1e4 * radius
    )  # random signs may cancel
    if name == "geometric_median":
        share = most / N
        assert np.linalg.norm(point - centre) <= 2 * (1 - share) / (1 - 2 * share) * radius
    elif name == "norm_bounded_mean":  # the median norm is an honest client's
        assert np.linalg.norm(point) <= max(np.linalg.norm(rows, axis=1)) * (1 + 1e-6)
    else:
        assert (rows.min(0) <= point).all()
        assert (point <= rows.max(0)).all()
    if name == "krum":
        assert any(same(found, updates[c]) for c in honest)


def test_weight_counts_where_the_docstring_says_so():
    """One client with most of the weight decides the medians, and does not decide Krum."""
    updates = draw(5)
    updates["client-7"] = {n: torch.full_like(v, 1e6) for n, v in updates["client-7"].items()}
    weights = equal() | {"client-7": 11.0}
    for name in ("coordinate_median", "geometric_median"):
        assert same(RULES[name](updates, weights), updates["client-7"])
    assert max(flat(RULES["krum"](updates, weights, byzantine=F))) < 10


def test_geometric_median_minimises_the_sum_of_distances():
    updates, weights = draw(6, dtype=torch.float64), draw_weights(6)
    rows, own = np.array([flat(u) for u in updates.values()]), np.array(list(weights.values()))
    point = np.array(flat(RULES["geometric_median"](updates, weights, iterations=2000, tolerance=1e-12)))
    unit = (point - rows) / np.linalg.norm(point - rows, axis=1, keepdims=True)
    assert np.linalg.norm((own[:, None] * unit).sum(0)) < 1e-6 * own.sum()


def test_geometric_median_is_done_after_few_steps_under_a_large_attack():
    updates, _ = attacked(7, 4, together=True)
    rough, exact = (flat(RULES["geometric_median"](updates, equal(), iterations=i)) for i in (10, 1000))
    assert math.dist(rough, exact) < 0.02 * math.hypot(*exact)


def test_krum_takes_the_first_of_equals():
    values = {f"client-{i}": {"head.w": torch.tensor([float(v)])} for i, v in enumerate([5, 0, 1, 1, 0])}
    assert RULES["krum"](values, equal(5), byzantine=0)["head.w"].item() == 0.0  # clients 1 to 4 all score 0 + 1 + 1
    assert RULES["krum"]({c: values[c] for c in reversed(values)}, equal(5), byzantine=0)["head.w"].item() == 0.0


def test_norm_bound_limits_what_one_client_adds():
    updates = draw(8)
    quiet = RULES["norm_bounded_mean"](updates, equal(), bound=1e9)
    assert np.allclose(flat(quiet), flat(weighted_mean(updates, equal())), rtol=1e-6)
    updates["client-3"] = {n: 1e6 * v for n, v in updates["client-3"].items()}
    loud = RULES["norm_bounded_mean"](updates, equal(), bound=0.5)
    assert math.hypot(*flat(loud)) <= 0.5 * (1 + 1e-6)


# ---- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", RULES)
def test_a_client_that_is_not_finite_is_named(name: str, bad: float):
    updates = draw(9)
    updates["client-4"]["head.w"][1] = bad
    with pytest.raises(ValueError, match=r"client-4: head\.w holds NaN, infinite or huge values; exclude"):
        RULES[name](updates, equal(), **OPTIONS[name])


@pytest.mark.parametrize(
    ("name", "clients", "options", "words"),
    [
        ("trimmed_mean", 11, {"trim": 0.5}, r"trim must be in \[0, 0\.5\), got 0\.5"),
        ("trimmed_mean", 11, {"trim": math.nan}, "trim must be in"),
        (
            "trimmed_mean",
            4,
            {"trim": 0.1},
            "trim = 0.1 of 4 clients drops none of them: bring at least 10 clients, or raise trim to 0.25",
        ),
        ("trimmed_mean", 2, {"trim": 0.4}, "trim = 0.4 of 2 clients drops none of them: bring at least 3"),
        (
            "krum",
            6,
            {"byzantine": 2},
            "byzantine = 2 needs n >= 2·2 \\+ 3 clients, got 6: lower byzantine to at most 1 or bring 7",
        ),
        ("krum", 2, {"byzantine": 0}, "byzantine = 0 .* got 2: bring 3"),
        ("krum", 9, {"byzantine": -1}, "byzantine must be >= 0, got -1"),
        ("multi_krum", 7, {"byzantine": 2, "keep": 6}, r"keep = 6 must be in \[1, n − byzantine\] = \[1, 5\]"),
        ("multi_krum", 7, {"byzantine": 2, "keep": 0}, "keep = 0"),
        (
            "bulyan",
            10,
            {"byzantine": 2},
            "byzantine = 2 needs n >= 4·2 \\+ 3 clients, got 10: lower byzantine to at most 1 or bring 11",
        ),
        ("geometric_median", 3, {"iterations": 0}, "iterations must be >= 1, got 0"),
        ("geometric_median", 3, {"tolerance": -1.0}, "tolerance must be >= 0"),
        ("geometric_median", 3, {"smoothing": 0.0}, "smoothing must be > 0"),
        ("norm_bounded_mean", 3, {"bound": 0.0}, "bound must be > 0 and finite, got 0.0"),
        ("norm_bounded_mean", 3, {"bound": math.inf}, "bound must be > 0"),
    ],
)
def test_refused_options(name: str, clients: int, options: dict[str, float], words: str):
    with pytest.raises(ValueError, match=words):
        RULES[name](draw(10, clients), equal(clients), **options)


@pytest.mark.parametrize("name", RULES)
def test_unusable_input_is_refused(name: str):
    def call(updates, weights):
        return RULES[name](updates, weights, **OPTIONS[name])

    with pytest.raises(ValueError, match="no update"):
        call({}, {})
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight of client-2 must be finite"):
            call(draw(11), equal() | {"client-2": bad})
    with pytest.raises(ValueError, match="all weights are 0"):
        call(draw(11), dict.fromkeys(equal(), 0.0))
    with pytest.raises(ValueError, match="client-10 has an update but no weight"):
        call(draw(11), equal(10))
    lacking, odd, narrow = draw(11), draw(11), draw(11)
    del lacking["client-3"]["head.w"]
    odd["client-3"]["head.w"] = torch.zeros(1)
    narrow["client-3"]["head.w"] = torch.zeros(2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"client-3 and client-0 differ in 'head\.w'"):
        call(lacking, equal())
    for broken in (odd, narrow):
        with pytest.raises(ValueError, match=r"client-3: head\.w is torch\.float"):
            call(broken, equal())


def test_clients_are_in_client_order_not_in_text_order():
    """Krum's first of equals is client-2, not client-10."""
    updates = {c: {"head.w": torch.tensor([v])} for c, v in (("client-10", 0.0), ("client-2", 1.0), ("client-3", 9.0))}
    assert sorted(updates, key=client_order)[0] == "client-2"
    assert RULES["krum"](updates, dict.fromkeys(updates, 1.0), byzantine=0)["head.w"].item() == 1.0
