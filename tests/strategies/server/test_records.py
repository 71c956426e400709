"""Arrays decode to what numpy reads, whatever they claim to be."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array

from strategies.server.records import decode, from_record, to_record


def npy(value: np.ndarray, version: tuple[int, int] | None = None) -> Array:
    buffer = BytesIO()
    np.lib.format.write_array(buffer, value, version, allow_pickle=True)
    return Array(str(value.dtype), tuple(value.shape), "numpy.ndarray", buffer.getvalue())


@pytest.mark.parametrize("version", [None, (1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    "value",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        np.zeros((0, 5), np.float32),
        np.float32(3.0).reshape(()),
        np.arange(6, dtype=np.uint16),
        np.arange(4, dtype=">f8").reshape(2, 2),
    ],
    ids=["matrix", "by columns", "no rows", "a number", "bits", "big-endian"],
)
def test_what_numpy_reads(value: np.ndarray, version: tuple[int, int] | None):
    for _ in range(2):  # the second time from what was remembered
        found = decode(npy(value, version))
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        assert np.array_equal(found, value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_come_back(dtype: str):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, 2)}
    back = from_record(to_record(state, dtype), dtype)
    assert {n: v.tolist() for n, v in back.items()} == {n: v.tolist() for n, v in state.items()}
    back["a"] += 1  # of its own memory
    assert from_record(to_record(state, dtype), dtype)["a"].tolist() == state["a"].tolist()


def test_nothing_is_unpickled_and_nothing_is_read_past_the_end():
    with pytest.raises(ValueError, match="allow_pickle"):
        decode(npy(np.array([{"a": 1}], dtype=object)))
    whole = npy(np.arange(12, dtype=np.float32))
    for length in (0, 5, 9, 40, len(whole.data) - 1, len(whole.data) - 48):
        with pytest.raises((ValueError, EOFError)):
            decode(Array(whole.dtype, whole.shape, whole.stype, whole.data[:length]))
    with pytest.raises(ValueError, match="reshape"):
        decode(Array(whole.dtype, whole.shape, whole.stype, whole.data + b"more"))
    with pytest.raises(TypeError):
        decode(Array(whole.dtype, whole.shape, "something else", whole.data))
    long = npy(np.zeros(1, [(f"field_{i}", "f4") for i in range(40)]))  # a header too long to be remembered
    assert decode(long).dtype.names is not None
