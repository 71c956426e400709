import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fedlab.continual.sketch import noise_floor
from fedlab.continual.subspace import (
    CapacityExhausted,
    complement,
    extend,
    leading_triplets,
    leak,
)
from fedlab.lora.svd import orthonormal_rows


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(k: int, n: int, seed: int = 0) -> torch.Tensor:
    return orthonormal_rows(random(k, n, seed=seed))


def decaying(m: int, n: int, rate: float = 0.9) -> torch.Tensor:
    r = min(m, n)
    return rows(r, m, 1).mT @ torch.diag(rate ** torch.arange(r, dtype=torch.float64)) @ rows(r, n, 2)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(40, 28, 12), (28, 40, 28), (130, 90, 9), (90, 300, 3), (7, 1, 1), (1, 9, 1), (5, 5, 0)]
)
def test_leading_triplets_are_those_of_the_whole_decomposition(m, n, k):
    W = decaying(m, n)
    found = leading_triplets(W, k)
    _, S, _ = torch.linalg.svd(W)
    assert torch.allclose(found.values, S[:k], rtol=1e-9)
    assert torch.allclose(found.right @ found.right.mT, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(found.left @ found.left.mT, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(W @ found.right.mT, found.left.mT * found.values, atol=1e-9)
    assert torch.allclose(found.left @ W, found.values[:, None] * found.right, atol=2e-6)


@pytest.mark.parametrize("W", [torch.eye(80), random(100, 100), torch.zeros(70, 70), torch.ones(70, 90)])
def test_flat_and_deficient_spectra_still_give_triplets(W):
    found = leading_triplets(W, 10)
    assert torch.allclose(W.double() @ found.right.mT, found.left.mT * found.values, atol=1e-6)
    assert torch.allclose(found.values, torch.linalg.svdvals(W.double())[:10], atol=1e-6)


def test_a_large_layer_is_not_decomposed_whole(monkeypatch):
    sizes = []
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **k: sizes.append(min(A.shape)) or real(A, **k))
    leading_triplets(decaying(400, 300), 10)
    assert sizes
    assert max(sizes) <= 32


@pytest.mark.parametrize(("count", "bad"), [(-1, "count"), (6, "count")])
def test_counts_outside_are_refused(count, bad):
    with pytest.raises(ValueError, match=bad):
        leading_triplets(torch.eye(5), count)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.data())
def test_a_complement_completes_the_basis(n, data):
    k = data.draw(st.integers(0, n))
    P = rows(k, n) if k else torch.zeros(0, n, dtype=torch.float64)
    rest = complement(P)
    both = torch.cat([P, rest])
    assert rest.shape == (n - k, n)
    assert torch.allclose(both @ both.mT, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(rest, complement(P))


def test_a_complement_of_rounded_rows_is_orthogonal_to_the_rounded_rows():
    P = rows(20, 50).float()
    assert float((complement(P).double() @ P.double().mT).abs().max()) < 1e-6


def test_what_is_not_orthonormal_has_no_complement():
    with pytest.raises(ValueError, match="orthonormal"):
        complement(2 * rows(3, 8))
    with pytest.raises(ValueError, match="rows of length"):
        complement(torch.zeros(9, 8))


def project(delta: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(I − LᵀL)·ΔW·(I − RᵀR)."""
    delta = delta - (delta @ right.mT) @ right
    return delta - left.mT @ (left @ delta)


def test_an_optimiser_on_projected_gradients_leaks():
    """The trap that core coordinates avoid: AdamW rescales a projected gradient entry by entry, and out of the
    subspace.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(20, 24)
    top = leading_triplets(layer.weight, 8)
    left, right = top.left.float(), top.right.float()
    before = layer.weight.detach().clone()
    layer.weight.register_hook(lambda g: project(g, left, right))
    X, Y = torch.randn(64, 20), torch.randn(64, 24)
    optimizer = torch.optim.AdamW([layer.weight], lr=1e-2, weight_decay=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(X) - Y).square().mean().backward()
        optimizer.step()
    assert leak(layer.weight.detach() - before, left, right) > 0.05


def test_the_papers_projected_gradient_does_not_protect():
    """Equation 4 of OSFT removes the block L·R only; that the code here is two-sided is not by accident."""
    G, L, R = random(40, 28), rows(12, 40, 1), rows(12, 28, 2)
    paper = G - L.mT @ (L @ G @ R.mT) @ R
    assert leak(paper, L, R) > 0.3
    assert leak(project(G, L, R), L, R) < 1e-12


def test_leak_is_a_share():
    R = rows(3, 10)
    assert leak(torch.zeros(4, 10), None, R) == 0
    assert leak(random(4, 3) @ R, None, R) == pytest.approx(1)


def gram(span: torch.Tensor, count: int = 200, seed: int = 0) -> torch.Tensor:
    X = random(count, len(span), seed=seed) @ span
    return X.mT @ X


def test_extending_finds_the_inputs_span_and_keeps_what_was_there():
    first, second = rows(5, 32, 1), rows(4, 32, 2)
    P1 = extend(torch.zeros(0, 32), gram(first), 0.9999999, 30)
    assert len(P1) == 5
    P2 = extend(P1, gram(second), 0.9999999, 30)
    assert len(P2) == 9
    assert torch.equal(P2[:5], P1)
    assert P2.dtype == torch.float32
    assert float((second - (second @ P2.double().mT) @ P2.double()).norm()) < 1e-3
    assert torch.allclose(P2 @ P2.mT, torch.eye(9), atol=1e-6)


def test_the_same_task_twice_adds_nothing():
    G = gram(rows(6, 24, 1)) + 0.001 * torch.eye(24)
    once = extend(torch.zeros(0, 24), G, 0.98, 24)
    assert torch.equal(extend(once, G, 0.98, 24), once)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.3, 1.0))
def test_the_energy_is_held_and_not_by_more_directions_than_needed(energy):
    X = random(100, 16, seed=7) * torch.linspace(1, 0.05, 16)
    G = X.mT @ X
    P = extend(torch.zeros(0, 16, dtype=torch.float64), G, energy, 16)
    held = float(((P @ G) * P).sum() / G.trace())
    assert held >= energy - 1e-9
    values = torch.linalg.eigvalsh(G).flip(0)
    assert len(P) <= 1 or float(values[: len(P) - 1].sum() / G.trace()) < energy


def test_running_out_of_room_is_said_and_nothing_is_nan():
    with pytest.raises(CapacityExhausted, match=r"layer\.7: 10 of 16 input directions would be protected, 8 may be"):
        extend(torch.zeros(0, 16), gram(rows(10, 16)), 1 - 1e-12, 8, name="layer.7")


def test_noise_is_not_taken_for_directions():
    noise = random(40, 40, seed=9)
    noise = noise + noise.mT
    signal = 1e4 * gram(rows(3, 40))
    kept = extend(torch.zeros(0, 40), signal + noise, 0.9999999999, 40, floor=noise_floor(40, 1.0, math.sqrt(2)))
    assert len(kept) == 3
    assert len(extend(torch.zeros(0, 40), -signal, 0.9, 40)) == 0


@pytest.mark.parametrize("energy", [0.0, 1.5, math.nan])
def test_an_energy_is_a_share(energy):
    with pytest.raises(ValueError, match="energy"):
        extend(torch.zeros(0, 4), torch.eye(4), energy, 4)


def test_a_gram_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="gram holds NaN"):
        extend(torch.zeros(0, 4), torch.full((4, 4), math.nan), 0.9, 4)
