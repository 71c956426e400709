"""Masks modulo 2⁶⁴: key streams that hide what a client sends, and cancel in the sum (Bonawitz et al. 2017, section 4).

Every pair of neighbours has a stream, which one of the two adds and the other subtracts; every client adds one more of
its own, so that a value that came late, after its pairwise masks were taken off, is hidden still.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Values = Mapping[str, np.ndarray]  # name → int64 array, modulo 2⁶⁴
BLOCK = 2**15  # numbers of a stream at a time: they stay in the processor's cache
_ZEROS = bytes(8 * BLOCK)


def shifted(values: Values, plus: Iterable[bytes], minus: Iterable[bytes] = ()) -> dict[str, np.ndarray]:
    """Values (int64 arrays) with the streams of keys (32 bytes) added and subtracted, modulo 2⁶⁴; they are copied."""
    added, subtracted, result = list(plus), list(minus), {}
    for name in sorted(values):
        total = np.array(values[name], dtype=np.int64).view(np.uint64)  # a copy
        flat = total.reshape(-1)
        up, down = [_stream(key, name) for key in added], [_stream(key, name) for key in subtracted]
        for start in range(0, flat.size, BLOCK):
            part = flat[start : start + BLOCK]
            for stream in up:
                part += _next(stream, part.size)
            for stream in down:
                part -= _next(stream, part.size)
        result[name] = total.view(np.int64)
    return result


def add(first: Values, second: Values) -> dict[str, np.ndarray]:
    """Sums modulo 2⁶⁴ by name; either may lack a name."""
    result = dict(first)
    for name, value in second.items():
        mine = value.astype(np.int64).view(np.uint64)
        result[name] = (result[name].view(np.uint64) + mine).view(np.int64) if name in result else mine.view(np.int64)
    return result


def values_digest(values: Values) -> str:
    """SHA-256 (hex) of names, shapes and numbers."""
    found = hashlib.sha256()
    for name in sorted(values):
        value = np.ascontiguousarray(values[name], dtype="<i8")
        found.update(f"{len(name)}:{name}{list(value.shape)}".encode())
        found.update(value.tobytes())
    return found.hexdigest()


def _stream(key: bytes, name: str) -> Any:
    """Uniform bytes of this key for this tensor: AES-256-CTR from a place that the tensor's name says."""
    place = hashlib.sha256(name.encode()).digest()[:16]
    return Cipher(algorithms.AES(key), modes.CTR(place)).encryptor()


def _next(stream: Any, count: int) -> np.ndarray:
    """The next ``count`` (at most ``BLOCK``) uniform 64-bit numbers of a stream."""
    return np.frombuffer(stream.update(_ZEROS[: 8 * count]), dtype="<u8")
