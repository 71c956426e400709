"""One low-rank matrix from corrupted copies: against the truth, against the mean, and against dense loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlab.lora.robust_product import robust_low_rank


def copies(
    hostile: int, noise: float, seed: int = 0, clients: int = 10, attack: float = -1.0
) -> tuple[np.ndarray, list, np.ndarray]:
    """Truth [24, 18] of rank 3 and norm 1; factor pairs near it; their honest mean.

    The first ``hostile`` are multiplied by ``attack``.
    """
    g = torch.Generator().manual_seed(seed)
    P, _ = torch.linalg.qr(torch.randn(24, 3, generator=g, dtype=torch.float64))
    Q, _ = torch.linalg.qr(torch.randn(18, 3, generator=g, dtype=torch.float64))
    root = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).div(14**0.5).sqrt()
    B, A = P * root, (Q * root).mT
    pairs = []
    for _ in range(clients):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))[
            0
        ]  # factors differ where products agree
        own = B + noise * B.norm() / 72**0.5 * torch.randn(24, 3, generator=g, dtype=torch.float64)
        pairs.append((own @ turn, turn.mT @ A))
    honest = torch.stack([b @ a for b, a in pairs[hostile:]]).mean(0)
    return (
        (B @ A).numpy(),
        [(attack * b, a) if k < hostile else (b, a) for k, (b, a) in enumerate(pairs)],
        honest.numpy(),
    )


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


@pytest.mark.parametrize("rank", [3, 6])
@pytest.mark.parametrize("attack", [-1.0, -10.0, 1e6])
def test_low_rank_truth_survives_30_percent_of_hostile_copies(rank: int, attack: float):
    for noise, allowed in ((0.0, 1e-6), (0.05, 0.05)):
        truth, pairs, _ = copies(3, noise, attack=attack)
        B, A = robust_low_rank(pairs, rank)
        assert np.linalg.norm((B @ A).numpy() - truth) < allowed
        mean = np.mean([(b @ a).numpy() for b, a in pairs], axis=0)
        assert np.linalg.norm(truncated(mean, rank) - truth) > 0.5, "the mean fails here"
        assert torch.allclose(A @ A.mT, torch.eye(rank, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 1e-6), (0.05, 5e-3), (0.3, 3e-2)])
def test_low_rank_without_corruption_agrees_with_the_truncated_mean(noise: float, allowed: float):
    """A tenth of the spread: exact for equal copies, and otherwise a median's distance from a mean."""
    for seed in range(3):
        _, pairs, honest = copies(0, noise, seed)
        B, A = robust_low_rank(pairs, 3)
        wanted = truncated(honest, 3)
        assert np.linalg.norm((B @ A).numpy() - wanted) < allowed * np.linalg.norm(wanted)


def test_low_rank_against_dense_loops():
    """The compact coordinates change nothing: the same sub-gradient steps on m×n matrices."""
    _, pairs, _ = copies(3, 0.05)
    copied = [(b @ a).numpy() for b, a in pairs]
    unit = float(np.median([np.linalg.norm(c) for c in copied]))
    copied = [c / unit for c in copied]
    u, s, vt = np.linalg.svd(sum(c / np.linalg.norm(c) for c in copied) / 10)
    U, V = 0.01 * u[:, :3] * s[:3] ** 0.5, 0.01 * vt[:3].T * s[:3] ** 0.5
    for _ in range(60):
        residuals = [np.linalg.norm(U @ V.T - c) for c in copied]
        G = sum((U @ V.T - c) / r for c, r in zip(copied, residuals, strict=True)) / 10
        eta = 0.5 * float(np.median(residuals))
        U, V = U - eta * G @ V, V - eta * G.T @ U
    B, A = robust_low_rank(pairs, 3, iterations=60)
    assert np.allclose((B @ A).numpy(), unit * U @ V.T, rtol=0, atol=1e-10)


def test_low_rank_takes_mixed_ranks_weights_and_zero():
    truth, pairs, _ = copies(0, 0.0)
    wide = (torch.cat([pairs[0][0], torch.zeros(24, 2)], 1), torch.cat([pairs[0][1], torch.ones(2, 18)]))
    hostile = [(-b, a) for b, a in pairs[:6]]
    B, A = robust_low_rank(
        [*hostile, wide, *pairs[7:]], 3, weights=[1] * 6 + [3] * 4
    )  # 6 of 10 clients, a third of the weight
    assert np.linalg.norm((B @ A).numpy() - truth) < 1e-6
    B, A = robust_low_rank([(torch.zeros(24, 2), torch.ones(2, 18))] * 2 + [(torch.ones(24, 2), torch.ones(2, 18))], 3)
    assert B.dtype == A.dtype == torch.float32
    assert B.shape == (24, 3)
    assert A.shape == (3, 18)
    assert not B.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, r"rank = 0 must be in \[1, 18\]"),
        ({"rank": 19}, r"rank = 19 must be in \[1, 18\]"),
        ({"step": 0.0}, "step and init"),
        ({"init": 1.0}, "step and init"),
        ({"iterations": 0}, "iterations must be >= 1"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"weights": [1.0]}, "weights must be 10 finite numbers"),
        ({"weights": [0.0] * 10}, "weights must be 10"),
        ({"factors": []}, "no factor pair"),
        ({"factors": [(torch.ones(4, 2), torch.ones(3, 4))]}, "copy 0: B"),
        ({"factors": [(torch.ones(4, 2), torch.ones(2, 4)), (torch.ones(5, 2), torch.ones(2, 4))]}, "copy 1: B"),
        ({"factors": [(torch.full((4, 2), math.nan), torch.ones(2, 4))], "rank": 2}, "copy 0 holds NaN"),
    ],
)
def test_low_rank_refuses(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        robust_low_rank(**({"factors": copies(0, 0.0)[1], "rank": 3} | change))
