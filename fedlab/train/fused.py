"""Linear layers that many clients share in one pass: the frozen base once, every client's own small tensors, gradients
per example.

A row (example) of a batch belongs to a client; ``Rows.owner`` says to which. Per adapted module the forward pass is
y = x·Wᵀ + b + s·(x·A_kᵀ)·B_kᵀ with the row's own client k, as one autograd function. Its backward pass hands the
per-example gradients s·Σ_t g_t h_tᵀ [m, r] and s·Σ_t (B_kᵀ g_t) x_tᵀ [r, n] to a sink and the gradient of x to the
layer below. Nothing is computed for W, and the backward pass ends at the lowest adapted layer. A head's linear layers
have whole weights per client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlab.errors import ConfigError
from fedlab.lora.state import BASIS
from fedlab.models.loaded import LoadedModel
from fedlab.models.quantised import dense, kind_of
from fedlab.train.dropout import Masks


@dataclass
class Rows:
    """Whose tensors the rows of the pass under way use, and where their gradients go."""

    masks: Masks = field(default_factory=Masks)  # of adapter dropout
    owner: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # [N]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # State name → [N, *shape]
    totals: dict[str, Tensor] | None = None  # State name → [K, *shape], float64; given where no row is clipped
    summed: set[str] = field(default_factory=set)  # what went into ``totals`` instead of ``gradients``

    def product(self, name: str, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Take scale·Σ_t left_t·right_tᵀ of every row; left [N, T, a], right [N, T, b].

        Where nothing is clipped and it would be larger than its factors, it is never formed per row but summed over
        each client's.
        """
        tokens, a, b = left.shape[1], left.shape[2], right.shape[2]
        if self.totals is None or a * b <= tokens * (a + b):
            gradient = torch.bmm(left.mT, right)
            self.add(name, gradient.to(torch.promote_types(gradient.dtype, torch.float32)).mul_(scale))
            return
        for client in self.owner.unique().tolist():
            mine = self.owner == client
            self.totals[name][client].add_(left[mine].flatten(0, 1).mT @ right[mine].flatten(0, 1), alpha=scale)
        self.summed.add(name)

    def add(self, name: str, gradient: Tensor) -> None:
        """Sum over the uses of a layer that runs more than once in a pass."""
        self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient


class _Adapted(torch.autograd.Function):
    """One adapted layer. ``A`` is [K, r, n] and ``B`` [K, m, r]; without the K where all clients have the same and it
    is not trained.

    Where all rows are one client's, W + s·B·A is formed for the pass and again for the way back: cheaper than two thin
    products per row. A 16-bit base gets copies of A and B in its own type: products of 16 bits summed in 32, several
    times as fast as thin ones of 32 bits. With ``layer.basis`` U [p, m] the B of every client is Uᵀ·B with its own B
    [p, r]: outputs and gradients pass through U.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tick: Tensor, layer: AdaptedLayer, A: Tensor, B: Tensor) -> Tensor:
        masks, count = layer.rows.masks, x.shape[0]
        flat = x.reshape(count, -1, x.shape[-1])  # [N, T, n]
        drop = masks.scale(flat, layer.module) if masks.rate else None
        own_a, own_b = (_of(factor.to(flat.dtype), layer.rows.owner) for factor in (A, B))
        ctx.merged = drop is None and own_a.ndim == own_b.ndim == 2 and layer.merges(flat)
        dropped = flat if drop is None else (flat * drop).to(flat.dtype)
        h = dropped @ own_a.mT if layer.train_b or not ctx.merged else None  # [N, T, r]
        if ctx.merged:
            y = nn.functional.linear(flat, layer.merged(own_a, own_b), layer.bias)
        elif layer.basis is None:
            y = _add_product(layer.base(flat), cast(Tensor, h), own_b.mT, layer.scale)
        else:
            y = _add_product(layer.base(flat), cast(Tensor, h) @ own_b.mT, layer.basis, layer.scale)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(h if layer.train_b else None, dropped if layer.train_a else None, drop, own_a, own_b)
        return y  # [N, T, m]; as a view, what comes after could not change it in place (Falcon does)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layer: AdaptedLayer = ctx.layer
        h, x, drop, A, B = ctx.saved_tensors
        g = gradients[0].reshape(ctx.shape[0], -1, gradients[0].shape[-1])  # [N, T, m]
        small = g
        if layer.basis is not None and (layer.train_a or layer.train_b or not ctx.merged):
            small = small @ layer.basis.mT  # [N, T, p]
        if layer.train_b:
            layer.rows.product(layer.name_b, small, h, layer.scale)
        below = ctx.needs_input_grad[0]
        u = small @ B if layer.train_a or (below and not ctx.merged) else None  # [N, T, r]
        if layer.train_a:
            layer.rows.product(layer.name_a, cast(Tensor, u), x, layer.scale)
        if not below:
            return None, None, None, None, None
        if ctx.merged:
            dx = g @ layer.merged(A, B)
        elif drop is None:
            dx = _add_product(g @ layer.weight_mn, cast(Tensor, u), A, layer.scale)
        else:
            dx = g @ layer.weight_mn
            dx += (cast(Tensor, u) @ A * drop * layer.scale).to(dx.dtype)
        return dx.view(ctx.shape), None, None, None, None


def _of(tensors: Tensor, owner: Tensor) -> Tensor:
    """Each row's own factor: [N, *shape], or the one [*shape] that all rows share."""
    return tensors if tensors.ndim == 2 else tensors[0] if len(tensors) == 1 else tensors[owner]


def _add_product(y: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """y + scale·left·right, in place. y [N, T, q], left [N, T, r], right [r, q] or [N, r, q]."""
    if right.ndim == 2:
        y.view(-1, y.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right, alpha=scale)
        return y
    return y.baddbmm_(left, right, alpha=scale)


class _Whole(torch.autograd.Function):
    """A head's linear layer with weights [K, out, in] and biases [K, out] of its own per client."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tick: Tensor, layer: WholeLayer, weight: Tensor, bias: Tensor | None) -> Tensor:
        owner, count = layer.rows.owner, x.shape[0]
        flat = x.reshape(count, -1, x.shape[-1]).to(weight.dtype)
        own = weight[owner]  # [N, out, in]
        y = torch.bmm(flat, own.mT)
        if bias is not None:
            y = y + bias[owner][:, None]
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        ctx.save_for_backward(flat, own)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        layer: WholeLayer = ctx.layer
        x, weight = ctx.saved_tensors
        g = gradients[0].reshape(ctx.shape[0], -1, gradients[0].shape[-1])
        layer.rows.product(layer.name_weight, g, x)
        if layer.name_bias is not None:
            layer.rows.add(layer.name_bias, g.sum(1))
        dx = torch.bmm(g, weight).view(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


class AdaptedLayer:
    """What stands in for one peft layer while a cohort trains."""

    def __init__(
        self,
        model: LoadedModel,
        module: str,
        tensors: Mapping[str, Tensor],
        trained: set[str],
        rows: Rows,
        tick: Tensor,
    ) -> None:
        self.module, self.rows, self._tick, self.scale = module, rows, tick, model.scale[module]
        self.name_a, self.name_b = f"{module}.lora_A", f"{module}.lora_B"
        self.train_a, self.train_b = self.name_a in trained, self.name_b in trained
        layer: Any = model.layer(module)
        self.layer = layer
        self.base: Callable[[Tensor], Tensor] = layer.base_layer
        self._transposed, self._tensors = model.transposed(module), tensors
        self.basis = tensors.get(f"{module}.{BASIS}")

    @property
    def weight_mn(self) -> Tensor:
        """The base weight as [m, n]; of a quantised one the numbers that it stands for."""
        weight = dense(self.layer.base_layer)
        return weight.mT if self._transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias [m]."""
        bias: Tensor | None = self.layer.base_layer.bias
        return bias

    def merges(self, x: Tensor) -> bool:
        """Whether forming W + s·B·A is the cheaper way for the rows x [N, T, n].

        Never in 16 bits, where a small B·A would be lost, nor for a quantised weight, which would be unpacked twice.
        """
        if kind_of(self.layer.base_layer) is not None:
            return False
        m, n = self.weight_mn.shape
        return self.weight_mn.dtype == self._tensors[self.name_a].dtype and x.shape[0] * x.shape[1] * (m + n) > m * n

    def merged(self, A: Tensor, B: Tensor) -> Tensor:
        """W + s·B·A [m, n]."""
        return torch.addmm(self.weight_mn, B if self.basis is None else self.basis.mT @ B, A, alpha=self.scale)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        A, B = self._tensors[self.name_a], self._tensors[self.name_b]
        y = cast(Tensor, _Adapted.apply(x, self._tick, self, A, B))  # type: ignore[no-untyped-call]
        return y if x.ndim == 3 else y.view(*x.shape[:-1], -1)


class WholeLayer:
    """What stands in for a head's linear layer while a cohort trains."""

    def __init__(self, weight: str, bias: str | None, tensors: Mapping[str, Tensor], rows: Rows, tick: Tensor) -> None:
        self.rows, self._tick, self._tensors = rows, tick, tensors
        self.name_weight, self.name_bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        bias = self._tensors[self.name_bias] if self.name_bias else None
        return cast(Tensor, _Whole.apply(x, self._tick, self, self._tensors[self.name_weight], bias))  # type: ignore[no-untyped-call]


def unfusable(model: LoadedModel, trained: Iterable[str]) -> str | None:
    """Why fused layers cannot train these tensors; None if they can."""
    for owner, found in _head_layers(model, trained).items():
        name = next(iter(found.values()))
        if not isinstance(owner, nn.Linear):
            return f"{name} belongs to a {type(owner).__name__}, not to a linear layer"
        if found.keys() != {leaf for leaf, _ in owner.named_parameters(recurse=False)}:
            return f"{name} is trained without the rest of its layer"
    return None


def _head_layers(model: LoadedModel, trained: Iterable[str]) -> dict[nn.Module, dict[str, str]]:
    """Layers of the head that are trained → the names of their weight and bias."""
    layers: dict[nn.Module, dict[str, str]] = {}
    for name in sorted(n for n in trained if n.startswith("head.")):
        owner = model.owners[name]
        leaf = next(leaf for leaf, p in owner.named_parameters(recurse=False) if p is model.parameters[name])
        layers.setdefault(owner, {})[leaf] = name
    return layers


class CohortLayers:
    """Context manager: while it is open the model's trained layers work with ``tensors``, name → [K, *shape] (a shared
    A: [r, n]).

    ``rows.owner`` (and with ``dropout`` > 0 ``rows.masks.keys``) must be set before each forward pass; after
    ``loss.backward()`` of a loss summed over rows, ``take()`` gives the per-example gradients, name → [N, *shape];
    where nothing is clipped, ``rows.totals`` may be set to what each client's rows are added to, and large gradients
    then go there alone. Raises ConfigError for a trained tensor of a layer that is not linear.
    """

    def __init__(
        self, model: LoadedModel, tensors: Mapping[str, Tensor], trained: Iterable[str], dropout: float = 0.0
    ) -> None:
        self.rows = Rows(Masks(dropout))
        self._trained = set(trained)
        tick = torch.zeros(
            (), device=model.device, requires_grad=True
        )  # makes the lowest layer's output differentiable
        self._stand_ins: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        modules = sorted({n.rpartition(".")[0] for n in self._trained if not n.startswith("head.")})
        for module in modules:
            adapted = AdaptedLayer(model, module, tensors, self._trained, self.rows, tick)
            self._stand_ins.append((adapted.layer, adapted))
        if reason := unfusable(model, self._trained):
            raise ConfigError(f"{reason}; a shared pass cannot train it")
        for owner, found in _head_layers(model, self._trained).items():
            self._stand_ins.append((owner, WholeLayer(found["weight"], found.get("bias"), tensors, self.rows, tick)))

    def __enter__(self) -> CohortLayers:
        for layer, stand_in in self._stand_ins:
            layer.forward = stand_in
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, _ in self._stand_ins:
            del layer.forward  # the instance's own; the class's shows again

    def take(self) -> dict[str, Tensor]:
        """The gradients of the last backward pass; raises if a trained layer took no part in it (a silent no-op)."""
        gradients, self.rows.gradients = self.rows.gradients, {}
        found, self.rows.summed = gradients.keys() | self.rows.summed, set()
        if missing := self._trained - found:
            raise RuntimeError(
                f"no gradient reached {sorted(missing)[0]}: the model does not use this layer; adapt other modules"
            )
        return gradients
