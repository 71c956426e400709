"""Tensors as Flower carries them, and back.

Thousands of clients bring tens of thousands of arrays, and decoding is most of their cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO

import numpy as np
from flwr.app import Array, ArrayRecord

from fedlab.lora.state import State, from_wire, to_wire

_MAGIC = b"\x93NUMPY\x01\x00"  # of .npy files in version 1.0, which is what numpy writes for plain arrays
_START = len(_MAGIC) + 2  # the header's length follows in two bytes
_LONGEST = 256  # headers of plain arrays are shorter; what a client makes longer is not remembered


def to_record(state: State, wire_dtype: str) -> ArrayRecord:
    """State → what Flower carries, in the wire dtype."""
    return ArrayRecord({name: Array(value) for name, value in to_wire(state, wire_dtype).items()})


def from_record(record: Mapping[str, Array], wire_dtype: str) -> State:
    """Inverse of ``to_record``; tensors are float32.

    Raises what numpy or ``from_wire`` raise for arrays that are none.
    """
    return from_wire({name: decode(array) for name, array in record.items()}, wire_dtype)


def decode(array: Array) -> np.ndarray:
    """``array.numpy()``, read-only, without parsing again a header that was seen before. Never unpickles."""
    data = array.data
    end = _START + int.from_bytes(data[_START - 2 : _START], "little")
    if array.stype != "numpy.ndarray" or not data.startswith(_MAGIC) or end > min(_LONGEST, len(data)):
        return array.numpy()
    shape, fortran, dtype = _header(data[_START - 2 : end])
    if fortran or dtype.hasobject:
        return array.numpy()
    return np.frombuffer(data, dtype, offset=end).reshape(shape)


@lru_cache(maxsize=4096)
def _header(raw: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type that a header names, with its two bytes of length before it."""
    return np.lib.format.read_array_header_1_0(BytesIO(raw))
