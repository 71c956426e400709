"""Stored hidden states of every text, as batches read them; ``fedlab.models.hidden_states`` computes and keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class HiddenStates:
    """Memory-mapped hidden states.

    Text i is rows ``starts[i]`` to ``starts[i] + length`` of ``parts[part_of[i]]`` [tokens, H].
    """

    dtype: torch.dtype
    starts: np.ndarray  # int64 [N]
    part_of: np.ndarray  # int64 [N]
    parts: list[np.ndarray]  # 16-bit floats as their bits

    def batch(self, indices: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Hidden states of these texts, padded on the right with zeros, [N, T, H]."""
        import torch  # here, as in collate

        width = self.parts[0].shape[1]
        result = np.zeros((len(indices), int(lengths.max()), width), dtype=self.parts[0].dtype)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            start = self.starts[index]
            result[row, :length] = self.parts[self.part_of[index]][start : start + length]
        return torch.from_numpy(result).view(self.dtype)
