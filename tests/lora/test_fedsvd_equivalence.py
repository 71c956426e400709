"""FedSVD is a change of basis: under SGD, with or without momentum and DP, it gives the B·A of FFA-LoRA with A₀ :=
QR(A₀).

A two-layer network in float64, its own small federated loop, plain autograd. ``docs/fedsvd.md`` says what this means.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlab.lora.svd import orthonormal_rows, refactorize, rotation

CLIENTS, ROUNDS, STEPS, RANK = 3, 8, 4, 3
SIZES = [(10, 12), (12, 5)]  # (inputs, outputs) of the two layers


def problem():
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(o, i, generator=g, dtype=torch.float64) / i**0.5 for i, o in SIZES]
    start = [orthonormal_rows(torch.randn(RANK, i, generator=g, dtype=torch.float64)) for i, _ in SIZES]
    data = [
        (torch.randn(16, 10, generator=g, dtype=torch.float64), torch.randint(0, 5, (16,), generator=g))
        for _ in range(CLIENTS)
    ]
    return weights, start, data


def example_loss(B: list[Tensor], A: list[Tensor], weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh((weights[0] + 2.0 * B[0] @ A[0]) @ x)
    return torch.nn.functional.cross_entropy(((weights[1] + 2.0 * B[1] @ A[1]) @ hidden)[None], y[None])


def gradient(B: list[Tensor], A: list[Tensor], weights: list[Tensor], data, noise: list[Tensor] | None) -> list[Tensor]:
    """Mean gradient of B, or with noise the DP-SGD one: per-example joint clip, sum, noise."""
    rows = []
    for x, y in zip(*data, strict=True):
        leaves = [b.detach().requires_grad_() for b in B]
        rows.append(torch.autograd.grad(example_loss(leaves, A, weights, x, y), leaves))
    if noise is None:
        return [torch.stack(column).mean(0) for column in zip(*rows, strict=True)]
    clip = 0.5
    factors = [min(1.0, clip / float(torch.cat([g.flatten() for g in row]).norm())) for row in rows]
    total = [sum(f * g for f, g in zip(factors, column, strict=True)) for column in zip(*rows, strict=True)]
    return [(t + z) / len(rows) for t, z in zip(total, noise, strict=True)]


def run(svd: bool, optimizer: str, dp: bool) -> list[Tensor]:
    """B·A of both layers after all rounds."""
    weights, start, data = problem()
    A = [a.clone() for a in start]
    B = [torch.zeros(o, RANK, dtype=torch.float64) for _, o in SIZES]
    for round_number in range(ROUNDS):
        results = []
        for client in range(CLIENTS):
            local = [b.clone().requires_grad_() for b in B]
            make = {
                "sgd": lambda p: torch.optim.SGD(p, 0.3),
                "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9),
                "adam": lambda p: torch.optim.Adam(p, 0.05),
            }
            optim = make[optimizer](local)
            for step in range(STEPS):
                noise = None
                if dp:
                    g = torch.Generator().manual_seed(1000 * round_number + 10 * client + step)
                    drawn = [torch.randn(o, RANK, generator=g, dtype=torch.float64) * 0.5 for _, o in SIZES]
                    noise = [
                        z @ rotation(a, a0).mT for z, a, a0 in zip(drawn, A, start, strict=True)
                    ]  # the same noise in this basis
                for parameter, grad in zip(local, gradient(local, A, weights, data[client], noise), strict=True):
                    parameter.grad = grad
                optim.step()
            results.append([p.detach() for p in local])
        B = [torch.stack(column).mean(0) for column in zip(*results, strict=True)]
        if svd:
            pairs = [refactorize(b, a) for b, a in zip(B, A, strict=True)]
            B, A = [b for b, _ in pairs], [a for _, a in pairs]
    return [b @ a for b, a in zip(B, A, strict=True)]


def distance(optimizer: str, dp: bool) -> float:
    found, wanted = run(True, optimizer, dp), run(False, optimizer, dp)
    return max(float((f - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dp", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_fedsvd_equals_ffa_with_orthonormal_a_under_sgd(optimizer: str, dp: bool):
    assert distance(optimizer, dp) < 1e-12


@pytest.mark.parametrize("dp", [False, True])
def test_fedsvd_differs_from_ffa_under_adam(dp: bool):
    assert distance("adam", dp) > 1e-3
