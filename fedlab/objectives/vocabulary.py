"""Cross-entropy over a large vocabulary, only where there is a label and never for all tokens at once.

Of [N, T, V] logits a language model's loss needs those of labelled positions, and of them the gradient in the hidden
states alone, since the output layer is frozen. So hidden states are gathered where labels are, and losses and gradients
are computed chunk by chunk: at most ``CHUNK_BYTES`` of logits are alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

CHUNK_BYTES = 2**26  # of float32 logits that are alive at once


ADDED = "final_logits_bias"  # a buffer that BART and its kin add to the logits of their output layer


@dataclass(frozen=True)
class OutputLayer:
    """A base model's frozen output layer, with whatever bias comes after it.

    Args:
        base: the model that has it.
        module: the layer.
        weight: [V, d].
        bias: [V], or None.
    """

    base: nn.Module
    module: nn.Module
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, base: nn.Module, module: nn.Module) -> Self:
        """The output layer ``module`` of a base."""
        weight, own, added = module.weight, getattr(module, "bias", None), getattr(base, ADDED, None)
        if added is not None:
            own = added.flatten() if own is None else own + added.flatten()
        return cls(base, module, cast(Tensor, weight), own)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """While open, the model's "logits" are the hidden states that the layer is fed."""
        layer, base, added = self.module, cast(Any, self.base), getattr(self.base, ADDED, None)
        before = {key: value for key, value in vars(layer).items() if key == "forward"}
        layer.forward = lambda hidden, *_, **__: hidden
        try:
            if added is not None:
                setattr(base, ADDED, added.new_zeros(()))
            yield
        finally:
            if added is not None:
                setattr(base, ADDED, added)
            del layer.forward
            vars(layer).update(before)


def token_losses(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Cross-entropy of every labelled position in nats, float32 [M]; differentiable in ``hidden`` alone.

    Args:
        hidden: [M, d], before the output layer.
        targets: [M], token ids.
        weight: [V, d] of the frozen output layer.
        bias: [V], or None.
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(hidden, targets, weight, bias)  # type: ignore[no-untyped-call]
    return losses


def scored(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``token_losses`` and ``most_probable`` of the same positions from logits that are made once; no gradients."""
    losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    best = torch.empty_like(targets)
    size = chunk_of(weight)
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        logits = linear(hidden[part], weight, bias).to(losses.dtype)
        losses[part] = _at_targets(logits, targets[part, None])[0]
        best[part] = logits.argmax(-1)
    return losses, best


def _at_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy at targets [M, 1] of logits [M, V], [M]; and log Σ exp of each row, [M, 1]."""
    total = logits.logsumexp(-1, keepdim=True)
    return (total - logits.gather(-1, targets))[:, 0], total


def most_probable(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The token of the largest logit at each position, [M]."""
    found = [linear(part, weight, bias).argmax(-1) for part in hidden.split(chunk_of(weight))]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=hidden.device)


def chunk_of(weight: Tensor) -> int:
    """Positions whose logits are alive at once."""
    return max(1, CHUNK_BYTES // (4 * len(weight)))


def chunk_bytes(weight: Tensor, positions: int) -> int:
    """Most bytes of logits that ``token_losses`` has alive at once: in float32, and 16 bits twice for such a base."""
    own = 2 * weight.element_size() if weight.element_size() < 4 else 0
    return min(positions, chunk_of(weight)) * len(weight) * (4 + own)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = chunk_of(weight)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = linear(hidden[part], weight, bias).to(losses.dtype)
            at_target = targets[part, None]
            losses[part], total = _at_targets(logits, at_target)
            if gradient is not None:
                slope = logits.sub_(total).exp_()  # softmax, in place
                slope.scatter_add_(-1, at_target, torch.full_like(total, -1.0))
                gradient[part] = slope.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return outer[:, None].to(gradient.dtype) * gradient, None, None, None
