"""Adapter dropout whose masks belong to the example, not to the pass that it is in.

Whether feature j at token t of an example is kept is a function of (run seed, client, round, step, example, module, t,
j) and nothing else: a hash of counters, computed where it is needed. So a client's masks are the same alone and beside
others, padded to any length, on any device, and again when a checkpointed layer is recomputed; there is no generator
whose state could differ.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from fedlab.models.loaded import PEFT_PREFIX, LoadedModel

_STEP, _EXAMPLE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


@dataclass
class Masks:
    """The masks of the rows of the pass under way.

    ``keys`` [N] must be set before each forward pass where ``rate`` > 0.
    """

    rate: float = 0.0  # share of entries that are zeroed, in [0, 1)
    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))  # of ``row_keys``

    def scale(self, x: Tensor, module: str) -> Tensor:
        """What x [N, ..., n] is multiplied with before the module's A: 0, or 1/(1 − rate); at least float32."""
        if x.shape[0] != len(self.keys):
            raise RuntimeError(f"dropout in {module}: {x.shape[0]} rows, but {len(self.keys)} examples")
        kept = keep(self.keys, module, x[0, ..., 0].numel(), x.shape[-1], self.rate)
        return kept.view(x.shape).to(torch.promote_types(x.dtype, torch.float32)) / (1 - self.rate)


def row_keys(seed: int, step: int, examples: np.ndarray) -> np.ndarray:
    """A 32-bit key per example, int32 [N], from the client's seed of the round (any integer), the step and the
    examples' positions.
    """
    z = np.uint64((seed + (step + 1) * _STEP) % 2**64) + (examples.astype(np.uint64) + np.uint64(1)) * np.uint64(
        _EXAMPLE
    )
    for shift, factor in (
        (30, 0xBF58476D1CE4E5B9),
        (27, 0x94D049BB133111EB),
    ):  # the finaliser of SplitMix64 (Steele et al., 2014)
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    keys: np.ndarray = (z >> np.uint64(32)).astype(np.uint32).view(np.int32)
    return keys


def keep(keys: Tensor, module: str, length: int, width: int, rate: float) -> Tensor:
    """Which entries are kept, bool [N, length, width]. A prefix of a longer one: padding changes nothing."""
    own = _hash(keys ^ _signed(zlib.crc32(module.encode())))  # [N]
    counter = torch.arange(length * width, dtype=torch.int32, device=keys.device) * _signed(0x9E3779B1)
    bits = _hash(own[:, None] ^ counter) & 0x7FFFFFFF  # uniform on [0, 2³¹)
    return (bits >= round(rate * 2**31)).view(-1, length, width)


def _hash(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that leaves no visible pattern (Wellons' lowbias32),
    in wrapping int32 arithmetic.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = x ^ ((x >> shift) & (2 ** (32 - shift) - 1))  # a logical shift: torch's keeps the sign
        x = x if factor == 1 else x * _signed(factor)
    return x


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


class DropoutLayers:
    """Context manager: while it is open, peft's own dropout layers use ``masks``.

    For one client at a time, through peft's layers.
    """

    def __init__(self, model: LoadedModel, masks: Masks) -> None:
        self._stand_ins: list[tuple[nn.Module, str]] = []
        self._masks = masks
        if masks.rate:
            for module in model.scale:
                layer = model.module.get_submodule(f"{PEFT_PREFIX}{module}.lora_dropout.default")
                self._stand_ins.append((layer, module))

    def __enter__(self) -> DropoutLayers:
        for layer, module in self._stand_ins:
            layer.forward = lambda x, module=module: x * self._masks.scale(x, module)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, _ in self._stand_ins:
            del layer.forward
