"""What is recorded of a finished run, read from its directory alone: digests of tensors, and numbers of result.json.

Needs nothing of the project: safetensors files are read as the format says (a JSON header, then the bytes).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
TENSORS = ("adapter_model.safetensors", "memory.safetensors")
SCORES = (
    *("accuracy", "macro_f1", "loss", "client_accuracy", "matrix", "average_accuracy", "learning_accuracy"),
    *("backward_transfer", "forward_transfer", "forgetting", "worst_tenth", "leak", "protected"),
)
COSTS = (
    *("status", "rounds", "epsilon", "epsilon_median", "epsilon_per_task", "bytes_up", "bytes_down", "excluded"),
    *("clients.epsilon", "clients.epsilon_before", "clients.delta", "clients.participations", "clients.examples"),
)
PER_CLIENT = ("epsilon", "epsilon_before", "delta", "participations", "examples", "accuracy", "rank")
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


def fingerprint(folder: Path, costs_only: bool) -> Record:
    """Flat record of every run below ``folder``: ``<file>`` → digest, and ``<run>: <field>`` → value.

    With ``costs_only`` it holds nothing but what the runs cost (status, ε, bytes, who took part).
    """
    record: Record = {}
    for path in sorted(folder.rglob("result.json")):
        where = path.parent.relative_to(folder)
        found = result_fields(json.loads(path.read_text(encoding="utf-8")))
        record |= {f"{where}: {key}": value for key, value in found.items() if not costs_only or key in COSTS}
    if not costs_only:
        record |= {str(path.relative_to(folder)): tensors_digest(path) for path in tensor_files(folder)}
    return record


def result_fields(result: Mapping[str, Any]) -> Record:
    """The fields of a result.json that are compared; of what it says per client, the sorted values."""
    result = first_edition(result)
    found = {key: result[key] for key in (*SCORES, *COSTS) if key in result}
    clients = list(result.get("clients", {}).values())
    for key in PER_CLIENT:
        if any(key in client for client in clients):
            found[f"clients.{key}"] = sorted(
                (client.get(key) for client in clients), key=lambda value: (str(type(value)), value)
            )
    return found


def first_edition(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result with its scores under the names that they had before scores were named: accuracy, macro_f1, loss."""
    if "average_score" in result:  # of a stream
        renamed = {"average_accuracy": "average_score", "learning_accuracy": "learning_score"}
        return {**result, **{old: result[new] for old, new in renamed.items() if new in result}}
    if "client_scores" not in result:
        return result
    scores = result.get("scores") or dict.fromkeys(("accuracy", "macro_f1", "loss"))
    clients = {name: {**own, "accuracy": own.get("score")} for name, own in result.get("clients", {}).items()}
    spread = {name: result["client_scores"][name] for name in ("mean", "worst", "std")}
    return {**result, **scores, "client_accuracy": spread, "clients": clients}


def tensor_files(folder: Path) -> Iterator[Path]:
    """Adapters (personal ones too) and the memories of tasks below a folder."""
    return (path for path in sorted(folder.rglob("*.safetensors")) if path.name in TENSORS)


def read_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name → (dtype, shape, bytes) of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def tensors_digest(path: Path) -> str:
    """SHA-256 over the sorted names, shapes, dtypes and bytes of a safetensors file."""
    result = hashlib.sha256()
    for name, (dtype, shape, data) in sorted(read_tensors(path).items()):
        result.update(f"{name}|{dtype}|{shape}|{len(data)}|".encode() + data)
    return result.hexdigest()


def differences(old: Record, new: Record, old_folder: Path | None, new_folder: Path | None) -> list[str]:
    """A line for every entry that differs; of tensors also by how much, where the folders are at hand."""
    lines = []
    for key in sorted(old.keys() | new.keys(), key=lambda key: (":" in key, key)):
        one, other = old.get(key, "missing"), new.get(key, "missing")
        if one == other:
            continue
        if old_folder and new_folder and key.endswith(".safetensors") and "missing" not in (one, other):
            lines.append(f"{key}: {tensor_difference(old_folder / key, new_folder / key)}")
        else:
            lines.append(f"{key}: {shortened(one)} → {shortened(other)}")
    return lines


def tensor_difference(old: Path, new: Path) -> str:
    """How two safetensors files differ: names, shapes, or the largest absolute difference."""
    one, other = read_tensors(old), read_tensors(new)
    if one.keys() != other.keys():
        return f"other tensors: {', '.join(sorted(one.keys() ^ other.keys())[:3])}"
    changed = [name for name in sorted(one) if one[name] != other[name]]
    if odd := [name for name in changed if one[name][:2] != other[name][:2]]:
        return f"{odd[0]} is {one[odd[0]][:2]} → {other[odd[0]][:2]}"
    gaps = [largest_gap(one[name], other[name]) for name in changed]
    return f"{len(changed)} of {len(one)} tensors, by up to {max(gaps):.2g}"


def largest_gap(one: tuple[str, list[int], bytes], other: tuple[str, list[int], bytes]) -> float:
    """Largest absolute difference of two tensors of one dtype; NaN where numpy has no such dtype."""
    if one[0] not in TYPES:
        return float("nan")
    read: Callable[[bytes], np.ndarray] = lambda data: np.frombuffer(data, TYPES[one[0]]).astype(np.float64)  # noqa: E731
    return float(np.max(np.abs(read(one[2]) - read(other[2])), initial=0.0))


def shortened(value: Any) -> str:
    """A value for one line of a table."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files below a folder."""
    result = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        result.update(f"{path.relative_to(folder)}|{len(data)}|".encode() + data)
    return result.hexdigest()
