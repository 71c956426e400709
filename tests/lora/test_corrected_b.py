"""The correction of B against its definition; what else holds of it is in tests/strategies/test_hetlora.py."""

from __future__ import annotations

import pytest
import torch

from fedlab.lora.exact import corrected_b


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_ridge_of_a_correction_is_relative_to_the_size_of_a(scale: float):
    """The same products as A·s and B/s: the corrected product is the same, and λ is a share of the mean of A·Aᵀ."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(6, 3, generator=generator).double(), torch.randn(3, 8, generator=generator).double())
        for _ in range(3)
    ]
    weights, ridge = [0.5, 0.3, 0.2], 0.1
    B, A = (sum(p * pair[i] for pair, p in zip(pairs, weights, strict=True)) for i in (0, 1))
    found = corrected_b(B / scale, A * scale, [(b / scale, a * scale) for b, a in pairs], weights, ridge) @ A * scale
    error = sum(p * b @ a for (b, a), p in zip(pairs, weights, strict=True)) - B @ A
    share = ridge * torch.trace(A @ A.T) / 3 * torch.eye(3).double()
    wanted = B @ A + error @ A.T @ torch.linalg.inv(A @ A.T + share) @ A
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
