"""What an adapted module sees: the leading right singular vectors of its input activations, as rows of A.

EVA (Paischer et al. 2024, arXiv 2410.07170) starts A there instead of at random. The texts here are *public*, read by
the server alone: activations of the clients' texts would be a release of private data, and no noise is made for one.
Not built: EVA's redistribution of ranks over modules (every module keeps ``lora.rank``), and centring (the paper
decomposes X itself, peft's code X minus its mean; uncentred, the first direction is close to the mean activation).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from fedlab.config.sections import LoraSection
from fedlab.data.collate import by_length, tokenise_public
from fedlab.data.public import public_texts
from fedlab.errors import ConfigError
from fedlab.lora.subspace import open_rows
from fedlab.lora.svd import principal_rows, row_signs
from fedlab.models.loaded import LoadedModel
from fedlab.models.watch import watching
from fedlab.seeds import torch_stream
from fedlab.session import torch_threads

EXACT = 2048  # inputs wider than this are sketched: their Gram matrix would take 8·n² bytes per module
SKETCH = 256  # columns of a sketch, at least 8 per direction wanted
FLOOR = 1e-12  # eigenvalues of XᵀX below this share of the largest are rounding of float32 activations
TOKENS, BATCH = 128, 32  # public texts are cut there; texts per forward pass


def public_inputs(loaded: LoadedModel, lora: LoraSection, seed: int) -> dict[str, Tensor]:
    """``principal_inputs`` of every adapted module over ``lora.public``, at the rank of its adapter.

    One torch thread, so that the bits do not depend on the machine's cores. Raises ConfigError for a file that cannot
    be used.
    """
    ranks = {module: len(loaded.parameters[f"{module}.lora_A"]) for module in loaded.scale}
    with torch_threads(1):
        return principal_inputs(loaded, public_batches(loaded, lora), ranks, seed)


def public_batches(loaded: LoadedModel, lora: LoraSection) -> Iterator[dict[str, Tensor]]:
    """The texts of ``lora.public``, tokenised; texts of like length together.

    Raises ConfigError for a file that cannot be used.
    """
    texts = public_texts(lora)
    limits = (
        TOKENS,
        loaded.tokenizer.model_max_length,
        getattr(loaded.module.config, "max_position_embeddings", TOKENS),
    )
    tokens = tokenise_public(texts, loaded.tokenizer, min(limits), loaded.objective)
    for chunk in by_length(tokens.lengths(np.arange(len(texts))), BATCH):
        yield tokens.batch(chunk, loaded.tokenizer.pad_token_id)


def real_tokens(module: str, x: Tensor, mask: Tensor) -> Tensor:
    """Activations [..., n] of the tokens that are no padding, [tokens, n]; ``mask`` [N, T] says which.

    Raises ConfigError if it cannot.
    """
    if x.shape[:-1] == mask.shape:  # [N, T, n]
        return x[mask]
    if x.shape[:-1] == (mask.numel(),):  # [N·T, n]
        return x[mask.flatten()]
    if x.shape[:-1] == mask.shape[:1]:  # [N, n]: one per text, after pooling
        return x
    raise ConfigError(
        f"lora.public: {module} is fed {tuple(x.shape)} for {tuple(mask.shape)} tokens, of which padding cannot be"
        " told; adapt other modules, or do without public texts"
    )


def principal_inputs(
    loaded: LoadedModel, batches: Iterable[dict[str, Tensor]], ranks: Mapping[str, int], seed: int = 0
) -> dict[str, Tensor]:
    """module → its r leading right singular vectors of X [tokens, n], the inputs of all non-padding tokens: orthonormal
    rows [r, n].

    The model runs with its adapter at zero, which is also how it is left. XᵀX is summed in float64 batch by batch. Up
    to n = EXACT that is all; beyond, only XᵀX·Ω for a fixed Gaussian Ω [n, max(SKETCH, 8 r)] is kept, and XᵀX is
    replaced by its Nyström approximation (Tropp et al. 2017, arXiv 1706.05736), exact where X has no more directions
    than Ω has columns. The largest entry of each row is positive. If X has fewer than r directions (few tokens), random
    ones from the stream of (seed, module) complete them.

    Raises ConfigError for a module that saw no token, that sees tokens of which padding cannot be told (experts), or
    whose activations are not finite.
    """
    loaded.load({name: torch.zeros(parameter.shape) for name, parameter in loaded.parameters.items()})
    sums = _SecondMoments(ranks)
    with torch.no_grad(), watching({module: loaded.layer(module) for module in sorted(ranks)}, sums.add):
        for batch in batches:
            sums.mask = batch["attention_mask"].to(loaded.device).bool()
            loaded.objective.visit(loaded, batch)
    return {module: _rows(sums, module, rank, seed) for module, rank in ranks.items()}


class _SecondMoments:
    """Sums XᵀX, or XᵀXΩ, of each module. Modules that are fed the same tensor (query, key, value) share one product."""

    def __init__(self, ranks: Mapping[str, int]) -> None:
        self.totals: dict[str, Tensor] = {}
        self.mask = torch.empty(0, dtype=torch.bool)  # [N, T] of the batch under way
        self._columns = max(SKETCH, 8 * max(ranks.values()))
        self._omega: dict[int, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def omega(self, n: int) -> Tensor | None:
        """Ω [n, columns], the same for all modules of this width; None where the sum is exact."""
        if n <= max(EXACT, self._columns):
            return None
        if n not in self._omega:
            generator = torch_stream(0, "sketch", n)
            self._omega[n] = torch.randn(n, self._columns, generator=generator, dtype=torch.float64)
        return self._omega[n]

    def add(self, module: str, x: Tensor | None, _: Tensor) -> None:
        """Add one module's inputs."""
        assert x is not None
        if self._last is None or self._last[0] is not x:
            self._last = x, self._product(module, x)
        product = self._last[1]
        self.totals[module] = self.totals[module] + product if module in self.totals else product

    def _product(self, module: str, x: Tensor) -> Tensor:
        x = real_tokens(module, x, self.mask).double()
        omega = self.omega(x.shape[-1])
        return x.mT @ (x if omega is None else x @ omega.to(x.device))


def _rows(sums: _SecondMoments, module: str, rank: int, seed: int) -> Tensor:
    if module not in sums.totals or not bool(sums.totals[module].any()):
        raise ConfigError(f'lora.init_a = "eva": {module} saw no public token; give more text, or adapt other modules')
    total = sums.totals[module].cpu()
    if not bool(torch.isfinite(total).all()):
        raise ConfigError(
            f'lora.init_a = "eva": activations of {module} are NaN or infinite; use run.dtype = "float32"'
        )
    n = len(total)
    omega = sums.omega(n)
    rows, values = principal_rows(total, rank) if omega is None else _nystrom(total, omega, rank)
    rows = rows[values > FLOOR * values[0]]
    if len(rows) < rank:
        generator = torch_stream(seed, "eva", module)
        candidates = torch.randn(min(n, 2 * rank), n, generator=generator, dtype=torch.float64)
        rows = torch.cat([rows, open_rows(rows, candidates, rank - len(rows))])
    return (rows * row_signs(rows)[:, None]).float()


def _nystrom(sketch: Tensor, omega: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors [r, n] and eigenvalues of Y·(ΩᵀY)⁺·Yᵀ, Y = G·Ω, in descending order."""
    core = omega.mT @ sketch
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    kept = values > FLOOR * values[-1]
    left, singular, _ = torch.linalg.svd(sketch @ (vectors[:, kept] / values[kept].sqrt()), full_matrices=False)
    return left.mT[:rank], singular[:rank].square()
