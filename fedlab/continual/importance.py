"""Which layers matter most, and how many of their singular directions OSFT then preserves (arXiv 2504.07097, section
3.3).

The paper looks at the last task's data. Here it is public texts, which the server reads: what clients' texts do in a
layer would be a private release, for a number that the paper calls robust to 5 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedlab.errors import ConfigError
from fedlab.models.activations import real_tokens
from fedlab.models.loaded import LoadedModel
from fedlab.models.watch import watching


def layer_importance(model: LoadedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """module → mean over the tokens of ``batches`` of the cosine of its input and its output, with the model as it is
    loaded.

    Raises ConfigError for a module that saw no token, or tokens of which padding cannot be told.
    """
    sums, counts = dict.fromkeys(model.scale, 0.0), dict.fromkeys(model.scale, 0)
    mask = torch.empty(0, dtype=torch.bool)

    def add(module: str, inputs: Tensor | None, output: Tensor) -> None:
        assert inputs is not None
        x, y = (real_tokens(module, value, mask) for value in (inputs, output))
        sums[module] += importance(x, y) * len(x)
        counts[module] += len(x)

    with torch.no_grad(), watching(model.adapted, add):
        for batch in batches:
            mask = batch["attention_mask"].to(model.device).bool()
            model.objective.visit(model, batch)
    if unseen := sorted(module for module, count in counts.items() if not count):
        raise ConfigError(f"lora.public: {unseen[0]} saw no token of it; give more text, or adapt other modules")
    return {module: total / counts[module] for module, total in sums.items()}


def importance(inputs: Tensor, outputs: Tensor) -> float:
    """Mean cosine of a linear layer's inputs [N, n] and outputs [N, m] (OSFT, section 3.3), on their first min(m, n)
    coordinates.

    The paper leaves m ≠ n undefined; its released code cuts both to the shorter. Zero rows count as cosine 0.
    """
    width = min(inputs.shape[-1], outputs.shape[-1])
    cosines = torch.nn.functional.cosine_similarity(inputs[:, :width].double(), outputs[:, :width].double(), dim=-1)
    return float(cosines.mean()) if len(cosines) else 0.0


def preserved_ranks(
    shapes: Mapping[str, tuple[int, int]],
    importances: Mapping[str, float] | None = None,
    low: float = 0.1,
    high: float = 0.8,
) -> dict[str, int]:
    """Directions to preserve per layer: k = ⌊r·min(m, n)⌋ with r = low + I·(high − low), at most min(m, n) − 1.

    ``importances`` below 0 count as 0 and are normalised to mean 1; r is clamped to [low, 1] (the paper's r exceeds 1
    for I > 1.29). None, or no positive one, gives I = 1 everywhere. Raises ValueError unless 0 <= low <= high <= 1 and
    every importance is finite.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"want 0 <= low <= high <= 1, got low = {low}, high = {high}")
    if importances is not None and not all(math.isfinite(importances[name]) for name in shapes):
        raise ValueError(f"importances must be finite, got {dict(importances)}")
    raw = {name: max(0.0, importances[name]) if importances is not None else 1.0 for name in shapes}
    mean = sum(raw.values()) / len(raw) if raw else 0.0
    ranks = {}
    for name, (m, n) in shapes.items():
        relative = raw[name] / mean if mean else 1.0
        ratio = min(1.0, max(low, low + relative * (high - low)))
        ranks[name] = max(0, min(int(ratio * min(m, n)), min(m, n) - 1))
    return ranks
