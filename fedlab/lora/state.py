"""The tensors that travel: LoRA factors and head, flat and named, and how they cross the wire.

``<module>.lora_A`` [r, n], ``<module>.lora_B`` [m, r], ``head.<name>``; float32 on the CPU everywhere but on the wire.
A strategy that folds something into the base keeps it low-rank: ``<module>.residual_A`` [k, n] and
``<module>.residual_B`` [m, k], any k, never trained: effective weight W + s·(lora_B·lora_A + residual_B·residual_A).

Two more parts belong to continual learning and stay as they are during a task: ``<module>.basis_U`` [p, m], orthonormal
rows, in whose coordinates lora_B [p, r] is then written (effective B = basis_Uᵀ·lora_B), and ``<module>.past_A`` [k,
n], the A of earlier tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedlab.files import replacing
from fedlab.seeds import client_order

State = dict[str, Tensor]

PARTS = ("lora_A", "lora_B", "head")
RESIDUAL = ("residual_A", "residual_B")
BASIS, PAST = "basis_U", "past_A"
UNTRAINED = (*RESIDUAL, BASIS, PAST)  # parts that a model does not hold as parameters


def part_of(name: str) -> str:
    """The part that a tensor's name says: ``lora_A``, ``lora_B``, ``head`` or one of ``UNTRAINED``; ValueError for any
    other name.
    """
    if name.startswith("head."):
        return "head"
    part = name.rpartition(".")[2]
    if part not in PARTS[:2] + UNTRAINED:
        raise ValueError(
            f"{name!r} is no state name: want head.<name> or <module>.<part>, a part of"
            f" {', '.join(PARTS[:2] + UNTRAINED)}"
        )
    return part


def modules(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Sorted names of the modules that have a LoRA pair. Raises ValueError where one factor lacks the other."""
    found = {part: {n.rpartition(".")[0] for n in state if part_of(n) == part} for part in PARTS[:2]}
    if odd := found["lora_A"] ^ found["lora_B"]:
        raise ValueError(f"{sorted(odd)[0]!r} has only one of lora_A and lora_B")
    return tuple(sorted(found["lora_A"]))


def select(state: Mapping[str, Tensor], parts: Collection[str]) -> State:
    """The tensors of the given parts (``lora_A``, ``lora_B``, ``head``), not copied."""
    return {name: value for name, value in state.items() if part_of(name) in parts}


def check_update(update: Mapping[str, Tensor], like: Mapping[str, Tensor], names: Iterable[str]) -> str | None:
    """Why an update cannot be used, or None.

    It must hold exactly ``names``, with the shapes of ``like`` and finite float32 values.
    """
    wanted = set(names)
    if missing := wanted - update.keys():
        return f"{sorted(missing)[0]} is missing"
    if unknown := update.keys() - wanted:
        return f"{sorted(unknown)[0]!r} was not asked for"
    for name, value in update.items():
        if value.shape != like[name].shape:
            return f"{name} has shape {tuple(value.shape)}, want {tuple(like[name].shape)}"
        if value.dtype != torch.float32:
            return f"{name} has dtype {value.dtype}, want torch.float32"
        if not bool(torch.isfinite(value).all()):
            return f"{name} holds NaN or infinite values"
    return None


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names."""
    result = hashlib.sha256()
    for name, value in sorted(state.items()):
        array = value.detach().cpu().contiguous().numpy()
        result.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        result.update(array.tobytes())
    return result.hexdigest()


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, whole or not at all (``fedlab.files``); its folder must be there."""
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, str(temporary))


def nbytes(state: Mapping[str, Tensor], wire_dtype: str = "float32") -> int:
    """Bytes of the values on the wire."""
    return sum(value.numel() for value in state.values()) * _width(wire_dtype)


def to_wire(state: Mapping[str, Tensor], wire_dtype: str = "float32") -> dict[str, np.ndarray]:
    """numpy arrays to send. bfloat16, which numpy lacks, travels as its bits in uint16."""
    if _width(wire_dtype) == 4:
        return {name: value.detach().cpu().float().numpy() for name, value in state.items()}
    return {name: value.detach().cpu().bfloat16().view(torch.uint16).numpy() for name, value in state.items()}


def from_wire(arrays: Mapping[str, np.ndarray], wire_dtype: str = "float32") -> State:
    """Inverse of ``to_wire``: float32 tensors of their own memory. Raises ValueError for an array of another dtype."""
    expected = np.dtype(np.float32 if _width(wire_dtype) == 4 else np.uint16)
    state: State = {}
    for name, array in arrays.items():
        if array.dtype != expected:
            raise ValueError(f"{name} came as {array.dtype}, want {expected} (wire dtype {wire_dtype})")
        tensor = torch.from_numpy(array.copy())
        state[name] = tensor if wire_dtype == "float32" else tensor.view(torch.bfloat16).float()
    return state


def effective_delta(state: Mapping[str, Tensor], module: str, scale: float) -> Tensor:
    """scale·(B·A + residual) [m, n]: what is added to the module's weight (scale = α/r, or α/√r with rsLoRA)."""
    delta = outer_b(state, module) @ state[f"{module}.lora_A"]
    if (residual := residual_of(state, module)) is not None:
        delta = delta + residual[0] @ residual[1]
    return scale * delta


def outer_b(state: Mapping[str, Tensor], module: str) -> Tensor:
    """B [m, r] of a module, out of the coordinates of ``basis_U`` if it is written in them."""
    B, basis = state[f"{module}.lora_B"], state.get(f"{module}.{BASIS}")
    return B if basis is None else basis.to(B.dtype).mT @ B


def local_pairs(
    state: Mapping[str, Tensor], updates: Mapping[str, Mapping[str, Tensor]], module: str
) -> list[tuple[Tensor, Tensor]]:
    """(B_k, A_k) of one module as each client ended with it, float64, in client order: what it started from plus its
    change.

    A client whose change has fewer directions (rank r_k < r) started from the first r_k.
    """
    pairs = []
    for client in sorted(updates, key=client_order):
        changes = {part: updates[client].get(f"{module}.{part}") for part in ("lora_B", "lora_A")}
        ranks = [c.shape[i] for c, i in ((changes["lora_B"], 1), (changes["lora_A"], 0)) if c is not None]
        B, A = (state[f"{module}.{part}"].double() for part in ("lora_B", "lora_A"))
        rank = min([*ranks, len(A)])
        B, A = B[:, :rank], A[:rank]
        pairs.append(
            (
                B if changes["lora_B"] is None else B + changes["lora_B"].double(),
                A if changes["lora_A"] is None else A + changes["lora_A"].double(),
            )
        )
    return pairs


def residual_of(state: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor] | None:
    """(residual_B [m, k], residual_A [k, n]) of a module, or None.

    Raises ValueError where one factor lacks the other.
    """
    B, A = state.get(f"{module}.residual_B"), state.get(f"{module}.residual_A")
    if (B is None) != (A is None):
        raise ValueError(f"{module!r} has only one factor of its residual")
    return None if B is None or A is None else (B, A)


def with_residual(state: Mapping[str, Tensor], module: str, B: Tensor, A: Tensor) -> State:
    """The state with this residual of one module; none at all for k = 0."""
    names = f"{module}.residual_B", f"{module}.residual_A"
    rest = {name: value for name, value in state.items() if name not in names}
    return {**rest, names[0]: B, names[1]: A} if B.shape[-1] else rest


def _width(wire_dtype: str) -> int:
    widths = {"float32": 4, "bfloat16": 2}
    if wire_dtype not in widths:
        raise ValueError(f"wire_dtype must be float32 or bfloat16, got {wire_dtype!r}")
    return widths[wire_dtype]
