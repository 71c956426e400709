"""What is folded into the base: exact, or the best approximation where its rank is capped."""

from __future__ import annotations

import pytest
import torch

from fedlab.lora.state import State, residual_of
from strategies.folding import fold


def factors(seed: int, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, rank, generator=g).double(), torch.randn(rank, 11, generator=g).double()


@pytest.mark.parametrize("rank", [None, 1, 4, 6])
def test_a_residual_is_the_sum_of_all_that_was_folded_or_its_best_approximation(rank: int | None):
    state: State = {"m.lora_A": torch.zeros(1, 11), "m.lora_B": torch.zeros(8, 1)}
    first, second = factors(0), factors(1)
    found = residual_of(fold(fold(state, "m", first), "m", second, rank), "m")
    assert found is not None
    B, A = found
    assert B.shape[1] == A.shape[0] == min(6, rank or 6)
    U, S, Vt = torch.linalg.svd(first[0] @ first[1] + second[0] @ second[1])
    k = rank or 6
    torch.testing.assert_close((B @ A).double(), U[:, :k] * S[:k] @ Vt[:k], rtol=1e-4, atol=1e-5)
