"""Whether the adapter is the last round's state: its tensors against the sealed checkpoint, whose digest a ROUND names.

A state holds ``<module>.lora_A`` [r, n], ``<module>.lora_B`` [m, r] and ``head.<name>``; perhaps ``residual_A`` [k, n]
and ``residual_B`` [m, k], which the adapter has as further directions, and ``basis_U`` [p, m], in whose coordinates
``lora_B`` is then written. Everything is compared bit by bit but B in coordinates, whose product is compared to 1e-5.
Written on numpy from the format of safetensors; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fedlab.privacy.audit.directory import AuditedDirectory, Evidence
from fedlab.privacy.audit.lines import Line
from fedlab.privacy.audit.receipts import WHERE

MODEL, PREFIX = "adapter/adapter_model.safetensors", "base_model.model."
CHECKPOINT, SERVER = "checkpoints/round-", "server/"
MOST_HEADER = 2**24
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BF16": "<u2"}
Tensors = Mapping[str, np.ndarray]


def check_adapter(audit: AuditedDirectory, evidence: Evidence) -> None:
    """The sealed checkpoint has the digest of the last round's state, and the adapter holds its tensors."""
    final = evidence.receipts.final if evidence.receipts else None
    if final is None or not evidence.finished or audit.findings:
        return
    kept = [name for name in final["files"] if name.startswith(CHECKPOINT)]
    if len(kept) != 1 or MODEL not in final["files"]:
        _without(audit, evidence, final)
        return
    try:
        whole = read_tensors(audit.root / kept[0])
        adapter = read_tensors(audit.root / MODEL)
    except (OSError, ValueError) as error:
        audit.find(kept[0], f"cannot be compared with the adapter: {error}")
        return
    state = {name: value for name, value in whole.items() if not name.startswith(SERVER)}
    if state_digest(state) != final["state"]:
        audit.find(kept[0], f"holds another state than FINAL names ({WHERE} line {final.number})")
        return
    for name, problem in compare(state, adapter):
        audit.find(MODEL, f"{name} {problem} the last round's state")


def _without(audit: AuditedDirectory, evidence: Evidence, final: Line) -> None:
    """A run that kept no round has no checkpoint, and its adapter is the one that it began with."""
    rounds = [line for line in evidence.receipts.chain.of("ROUND") if line.sound] if evidence.receipts else []
    if rounds and final["state"] != rounds[0]["before"]:
        audit.find(
            CHECKPOINT + "….safetensors", f"is not among the files that FINAL names ({WHERE} line {final.number})"
        )
    else:
        audit.leave(f"{MODEL}: no round was kept, so it is what the run began with")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped, not copied. Raises ValueError for anything else."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= MOST_HEADER:
            raise ValueError(f"its header would have {size} bytes")
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError):
            raise ValueError("its header is no JSON") from None
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    found = {}
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            value = data[begin:end].view(TYPES[entry["dtype"]]).reshape(entry["shape"])
            found[name] = widened(value) if entry["dtype"] == "BF16" else value
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"its tensor {name[:60]!a} cannot be read") from None
    return found


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, which numpy lacks, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def state_digest(state: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names: the digest of ``docs/ledger.md``."""
    result = hashlib.sha256()
    for name, value in sorted(state.items()):
        result.update(f"{name}|{value.dtype.str}|{value.shape}|".encode())
        result.update(np.ascontiguousarray(value).tobytes())
    return result.hexdigest()


def compare(state: Tensors, adapter: Tensors) -> Iterator[tuple[str, str]]:
    """(tensor, what is wrong) of every tensor of the adapter that the state does not make."""
    wanted, close = expected(state)
    for name in sorted(wanted.keys() - adapter.keys()):
        yield name, "is missing of"
    for name, value in sorted(adapter.items()):
        want = wanted.get(name)
        if want is None:
            yield name, "is not in"
        elif want.shape != value.shape:
            yield name, f"has shape {value.shape}, {want.shape} in"
        elif name in close:
            scale = float(np.abs(want).max(initial=0.0))
            if not np.abs(want - value).max(initial=0.0) <= 1e-5 * scale:
                yield name, "differs by more than 1e-5 from"
        elif want.astype(value.dtype).tobytes() != np.ascontiguousarray(value).tobytes():
            yield name, "differs from"


def expected(state: Tensors) -> tuple[dict[str, np.ndarray], set[str]]:
    """The adapter's tensors that a state makes, and which of them are products, so equal up to rounding only."""
    wanted = {PREFIX + name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    close: set[str] = set()
    for module in sorted(name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")):
        A, B = state[f"{module}.lora_A"], state[f"{module}.lora_B"]
        names = [f"{PREFIX}{module}.{part}.weight" for part in ("lora_A", "lora_B")]
        if (basis := state.get(f"{module}.basis_U")) is not None:
            B = basis.astype(B.dtype).T @ B
            close.add(names[1])
        if f"{module}.residual_A" in state:
            A = np.concatenate([A, state[f"{module}.residual_A"]], 0)
            B = np.concatenate([B, state[f"{module}.residual_B"]], 1)
        wanted |= dict(zip(names, (A, B), strict=True))
    return wanted, close
