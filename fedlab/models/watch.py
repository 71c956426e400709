"""See what goes in and out of some modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

K = TypeVar("K")


@contextmanager
def watching(modules: Mapping[K, nn.Module], see: Callable[[K, Tensor | None, Any], None]) -> Iterator[None]:
    """While open, ``see(key, input, output)`` is called after each forward pass of each of these modules.

    Args:
        modules: key → module; hooked in this order.
        see: gets the module's first positional input (None if it has none) and its output as the module returns it.
    """

    def hook(key: K) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        return lambda _, inputs, output: see(key, inputs[0] if inputs else None, output)

    handles = [module.register_forward_hook(hook(key)) for key, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
