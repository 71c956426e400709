"""The transformer blocks of a model, found by where its adapters sit, and how to step over the lower ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedlab.errors import ConfigError


def find_blocks(module: nn.Module, adapted: Sequence[str], setting: str) -> tuple[list[nn.Module], int]:
    """The model's blocks in order, and the position of the lowest one with an adapter (names of ``adapted`` are
    submodules of ``module``).

    Raises ConfigError, naming the ``setting`` that needs them, unless the adapters sit in the blocks of one list.
    """
    places = _places(module, adapted)
    if len(places) != 1:
        found = ", ".join(sorted(places)) or "none"
        raise ConfigError(f"{setting} needs a model with one list of blocks that carries all adapters; found {found}")
    ((parent, positions),) = places.items()
    return list(cast(nn.ModuleList, module.get_submodule(parent))), min(positions)


def blocks_in_gradient(module: nn.Module, adapted: Sequence[str], setting: str) -> list[nn.Module]:
    """The blocks that a backward pass goes through: of each list those from its lowest one with an adapter; of a
    decoder that reads an adapted encoder all, since each of them passes gradients to the encoder.

    Raises ConfigError, naming the ``setting`` that needs them, unless the adapters sit in such lists.
    """
    places = _places(module, adapted)
    if len(places) == 1 or not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        blocks, lowest = find_blocks(module, adapted, setting)
        return blocks[lowest:]
    found = []
    for parent, positions in sorted(places.items()):
        blocks = list(cast(nn.ModuleList, module.get_submodule(parent)))
        found += blocks if "decoder" in parent.split(".") else blocks[min(positions) :]
    return found


def _places(module: nn.Module, adapted: Sequence[str]) -> dict[str, set[int]]:
    """Lists of blocks that carry adapters → the positions of those blocks."""
    places: dict[str, set[int]] = {}
    for name in adapted:
        path = name.split(".")
        for depth in range(1, len(path)):
            parent = ".".join(path[:depth])
            if isinstance(module.get_submodule(parent), nn.ModuleList):
                places.setdefault(parent, set()).add(int(path[depth]))
                break
    return places


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """``blocks`` keep their inputs only and compute the rest again on the way back.

    Nothing in them may draw random numbers.
    """
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


@contextmanager
def stepping_over(blocks: Sequence[nn.Module], hidden: Tensor, extra: int) -> Iterator[None]:
    """``blocks`` compute nothing: the last one gives ``hidden`` [N, T, H], in a tuple with ``extra`` empty places if
    extra >= 0.
    """
    try:
        for block in blocks[:-1]:
            block.forward = lambda x, *args, **kwargs: x if extra < 0 else (x, *[None] * extra)
        blocks[-1].forward = lambda *args, **kwargs: hidden if extra < 0 else (hidden, *[None] * extra)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
