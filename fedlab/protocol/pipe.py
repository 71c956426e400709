"""Frames over a private Unix socket, between what carries messages and the resident trainer. Standard library only.

A frame is one line of JSON (kind, and how many bytes of header, table and body follow) and those bytes.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
from typing import Any

PARTS = ("header", "table", "body")
MOST = {"header": 2**28, "table": 2**26, "body": 2**31}  # bytes
MOST_LINE = 512


class BrokenPipe(ConnectionError):
    """What came is no frame, or not a whole one."""


class NothingCame(BrokenPipe):
    """The connection ended before anything came: somebody looked whether the trainer is there."""


def send(connection: socket.socket, fields: dict[str, Any]) -> None:
    """Send a frame: ``kind`` (str), ``header``, ``table`` and ``body`` (bytes)."""
    line = {"kind": fields["kind"]} | {part: len(fields[part]) for part in PARTS}
    connection.sendall(json.dumps(line).encode() + b"\n")
    for part in PARTS:
        if fields[part]:  # whoever has all may have answered and gone: nothing more is sent, not even nothing
            connection.sendall(fields[part])


def receive(connection: socket.socket, most: dict[str, int] = MOST) -> dict[str, Any]:
    """A frame, as ``send`` takes it. Sizes are checked before anything is read.

    Raises:
        BrokenPipe: the connection ends early, or what comes is no frame, or a part is larger than ``most`` says.
        TimeoutError: the connection has a time-out, and nothing came.
    """
    try:
        told = json.loads(_line(connection))
        kind, sizes = str(told["kind"])[:64], {part: int(told[part]) for part in PARTS}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise BrokenPipe("the first line is no frame's") from None
    for part, size in sizes.items():
        if not 0 <= size <= most[part]:
            raise BrokenPipe(f"{part} has {size} bytes, at most {most[part]} are allowed")
    return {"kind": kind} | {part: _exactly(connection, size) for part, size in sizes.items()}


def peer_user(connection: socket.socket) -> int | None:
    """The user id of the process at the other end, as the kernel says; None where this system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(user)


def _line(connection: socket.socket) -> bytes:
    line = bytearray(connection.recv(1))
    if not line:
        raise NothingCame("nothing came")
    while not line.endswith(b"\n"):
        if len(line) >= MOST_LINE:
            raise BrokenPipe("the first line has no end")
        line += _exactly(connection, 1)
    return bytes(line)


def _exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes; memory grows with what has come, not with what was announced."""
    parts: list[bytes] = []
    missing = size
    while missing:
        part = connection.recv(min(missing, 2**20))
        if not part:
            raise BrokenPipe(f"the connection ended {missing} bytes too early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
