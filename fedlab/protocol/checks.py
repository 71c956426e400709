"""What came held against what was asked for: the arrays of a release."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlab.protocol.messages import Release
from fedlab.protocol.wire import DTYPES, ProtocolError

BFLOAT16_EXPONENT = np.uint16(0x7F80)  # all ones: infinite, or not a number


def check_arrays(release: Release, shapes: Mapping[str, tuple[int, ...]], dtype: str, client: str) -> None:
    """Raise ProtocolError unless a release holds exactly these arrays, of this wire type, finite.

    Args:
        release: as it was decoded.
        shapes: name → shape of what was asked for.
        dtype: ``float32``, ``bfloat16`` (its bits) or ``int64``.
        client: that sent it, for the error.
    """
    arrays = release.arrays
    if missing := sorted(shapes.keys() - arrays.keys()):
        raise ProtocolError(missing[0], "is missing", client)
    if unknown := sorted(arrays.keys() - shapes.keys()):
        raise ProtocolError(unknown[0][:80], "was not asked for", client)
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != tuple(shape):
            raise ProtocolError(name, f"has shape {array.shape}, want {tuple(shape)}", client)
        if array.dtype != DTYPES[dtype]:
            raise ProtocolError(name, f"came as {array.dtype}, want {DTYPES[dtype]} (wire type {dtype})", client)
        if not is_finite(array):
            raise ProtocolError(name, "holds NaN or infinite values", client)


def is_finite(array: np.ndarray) -> bool:
    """Whether all values of an array of the wire are finite; the bits of bfloat16 are read as such."""
    if array.dtype == DTYPES["bfloat16"]:
        return not bool(((array & BFLOAT16_EXPONENT) == BFLOAT16_EXPONENT).any())
    return bool(np.isfinite(array).all())


def wire_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Bytes that a release of these arrays takes in a body, padding included, at most."""
    return sum(int(np.prod(shape)) * DTYPES[dtype].itemsize + 8 for shape in shapes.values())
