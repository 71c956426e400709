"""Messages as bytes, and back.

A message is a frozen dataclass of plain values and named arrays (``fedlab.protocol.messages``). On the wire it is a
``Frame``: its kind, a header (JSON: the values, arrays by their position), a table (JSON: type and shape of each array)
and a body (the arrays' bytes, little-endian, each padded to 8). Whoever decodes one believes nothing: sizes are checked
before anything is read, types and ranges by pydantic in strict mode, shapes against the body's length. Arrays are views
of the body, so decoding allocates nothing for them; nothing is ever unpickled. Every failure is a ``ProtocolError``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import PlainSerializer, PlainValidator, TypeAdapter, ValidationError, ValidationInfo

from fedlab.errors import RunFailed

MOST_HEADER, MOST_TABLE = 2**28, 2**26  # bytes
MOST_ARRAYS, MOST_AXES, MOST_NAME = 2**20, 8, 512
ALIGNMENT = 8
# bfloat16, which numpy lacks, travels as its bits
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2"), "int64": np.dtype("<i8")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
M = TypeVar("M")


class ProtocolError(RunFailed):
    """A message that is not what was agreed. Names the client ("" if it concerns the whole message) and the field."""

    code = "request"

    def __init__(self, field: str, problem: str, client: str = "") -> None:
        super().__init__(f"{client + ': ' if client else ''}{field}: {problem}")
        self.client, self.field, self.problem = client, field, problem


@dataclass(frozen=True)
class Frame:
    """One message as bytes."""

    kind: str
    header: bytes
    table: bytes
    body: bytes


def _to_positions(arrays: dict[str, np.ndarray], info: Any) -> dict[str, int]:
    """What stands in the header for named arrays: where each is in the table."""
    collected: list[np.ndarray] = info.context
    positions = {name: len(collected) + i for i, name in enumerate(arrays)}
    collected.extend(arrays.values())
    return positions


def _from_positions(value: Any, info: ValidationInfo) -> dict[str, np.ndarray]:
    """Inverse of ``_to_positions``; each array of the table is taken once."""
    waiting: dict[int, np.ndarray] = info.context or {}
    if not isinstance(value, dict):
        raise ValueError("must name arrays")
    found: dict[str, np.ndarray] = {}
    for name, position in value.items():
        if not 0 < len(name) <= MOST_NAME:
            raise ValueError(f"an array's name has {len(name)} characters, at most {MOST_NAME} are allowed")
        if type(position) is not int or position not in waiting:
            raise ValueError(f"{name} is not in the table, or is there twice")
        found[name] = waiting.pop(position)
    return found


# name → array of one of DTYPES
Arrays = Annotated[dict[str, np.ndarray], PlainValidator(_from_positions), PlainSerializer(_to_positions)]


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}  # made at the first message of a kind: it takes a while


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


_TABLE: TypeAdapter[list[tuple[str, list[int]]]] = TypeAdapter(list[tuple[str, list[int]]])


def encode(kind: str, message: object) -> Frame:
    """One message as bytes. Raises ValueError for an array whose type is none of ``DTYPES``."""
    return encode_all(kind, [message])[0]


def encode_all(kind: str, messages: Sequence[object]) -> list[Frame]:
    """Messages to several nodes; those that carry the very same arrays share one body in memory."""
    bodies: dict[tuple[int, ...], tuple[bytes, bytes]] = {}
    frames = []
    for message in messages:
        arrays: list[np.ndarray] = []
        header = _adapter(type(message)).dump_json(message, context=arrays)
        key = tuple(map(id, arrays))
        if key not in bodies:
            bodies[key] = _table(arrays), _body(arrays)
        frames.append(Frame(kind, header, *bodies[key]))
    return frames


def decode(frame: Frame, kinds: dict[str, type[M]], most_body: int | None = None) -> M:
    """The message in a frame. Raises ProtocolError, and nothing else, whatever the bytes are.

    Args:
        frame: as it came.
        kinds: kind → dataclass of the messages that may come here.
        most_body: bytes of arrays at most; None where nothing bounds them but the transport.
    """
    if frame.kind not in kinds:
        raise ProtocolError("kind", f"{frame.kind[:40]!r} is not expected here, only {', '.join(kinds)}")
    for name, part, most in (
        ("header", frame.header, MOST_HEADER),
        ("table", frame.table, MOST_TABLE),
        ("body", frame.body, most_body),
    ):
        if not isinstance(part, bytes):
            raise ProtocolError(name, f"must be bytes, got {type(part).__name__}")
        if most is not None and len(part) > most:
            raise ProtocolError(name, f"{len(part)} bytes, at most {most} are allowed")
    waiting = dict(enumerate(_arrays(frame.table, frame.body)))
    try:
        message: M = _adapter(kinds[frame.kind]).validate_json(frame.header, strict=True, context=waiting)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ProtocolError(".".join(map(str, first["loc"])) or "header", first["msg"]) from None
    if waiting:
        raise ProtocolError("table", f"{len(waiting)} arrays belong to no field")
    return message


def _table(arrays: Sequence[np.ndarray]) -> bytes:
    return json.dumps([[_name(array), list(array.shape)] for array in arrays]).encode()


def _name(array: np.ndarray) -> str:
    name = NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise ValueError(f"arrays of {array.dtype} do not travel; known: {', '.join(DTYPES)}")
    return name


def _body(arrays: Sequence[np.ndarray]) -> bytes:
    parts: list[bytes] = []
    for array in arrays:
        data = np.ascontiguousarray(array).astype(DTYPES[_name(array)], copy=False).tobytes()
        parts += [data, bytes(-len(data) % ALIGNMENT)]
    return b"".join(parts)


def _arrays(table: bytes, body: bytes) -> list[np.ndarray]:
    """Read-only views of the body, as the table says. Raises ProtocolError unless they cover it exactly."""
    try:
        entries = _TABLE.validate_json(table, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ProtocolError("table", first["msg"]) from None
    if len(entries) > MOST_ARRAYS:
        raise ProtocolError("table", f"{len(entries)} arrays, at most {MOST_ARRAYS} are allowed")
    places, start = [], 0
    for dtype, shape in entries:
        if dtype not in DTYPES:
            raise ProtocolError("table", f"{dtype[:40]!r} is no type of an array; known: {', '.join(DTYPES)}")
        if len(shape) > MOST_AXES or any(side < 0 for side in shape):
            raise ProtocolError("table", f"{shape[: MOST_AXES + 1]} is no shape")
        size = math.prod(shape) * DTYPES[dtype].itemsize
        places.append((dtype, shape, start))
        start += size + -size % ALIGNMENT
        if start > len(body):
            raise ProtocolError("body", f"{len(body)} bytes, but the table describes more")
    if start != len(body):
        raise ProtocolError("body", f"{len(body)} bytes, but the table describes {start}")
    return [
        np.frombuffer(body, DTYPES[dtype], math.prod(shape), offset).reshape(shape)
        if math.prod(shape)
        else np.empty(shape, DTYPES[dtype])
        for dtype, shape, offset in places
    ]
