"""One ledger line: its bytes, its hash, its signature, and what a finding about it looks like. See ``docs/ledger.md``.

Written from the format alone, without the code that writes ledgers. Nothing here raises for any bytes, but
``canonical`` and ``digest`` for what is no line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedlab.privacy.audit.schema import COMMON

PREFIX = b"fedlab-ledger-v1:"  # of what is signed


@dataclass(frozen=True)
class Finding:
    """Something that is not as it must be. ``line`` counts from 1; None: the file as a whole."""

    where: str
    line: int | None
    message: str

    def __str__(self) -> str:
        place = self.where.encode("unicode_escape").decode() if not self.where.isprintable() else self.where
        return f"{place}: {f'line {self.line}: ' if self.line is not None else ''}{self.message}"


@dataclass(frozen=True)
class Line:
    """A line that conforms to its type. ``sound``: hash, signature and owner are right too."""

    number: int
    body: Mapping[str, Any]
    sound: bool

    @property
    def kind(self) -> str:
        return str(self.body.get("type"))

    @property
    def seq(self) -> int:
        return int(self.body["seq"])

    @property
    def hash(self) -> str:
        return str(self.body["hash"])

    def __getitem__(self, key: str) -> Any:
        return self.body[key]


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one serialisation of a line. Raises ValueError or RecursionError for what cannot be one."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def digest(body: Mapping[str, Any]) -> str:
    """The hash that a line with this content must carry."""
    return hashlib.sha256(
        canonical({key: value for key, value in body.items() if key not in ("hash", "sig")})
    ).hexdigest()


@lru_cache(maxsize=1024)
def _public(key: str) -> Ed25519PublicKey | None:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    except ValueError:
        return None


def signed(body: Mapping[str, Any], key: Any) -> bool:
    """Whether the line's ``sig`` over its ``hash`` is by this key. Never raises."""
    if (
        any(COMMON[name](body.get(name)) for name in ("hash", "sig"))
        or COMMON["hash"](key)
        or (public := _public(key)) is None
    ):
        return False
    try:
        public.verify(bytes.fromhex(body["sig"]), PREFIX + body["hash"].encode("ascii"))
    except InvalidSignature:
        return False
    return True


def _no_float(text: str) -> Any:
    raise ValueError(f"a floating-point number, {text[:40]!r}")


def parse(raw: bytes) -> dict[str, Any] | str:
    """The object on a line, or what is wrong with its bytes."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_float=_no_float, parse_constant=_no_float)
    except UnicodeDecodeError:
        return "was damaged: it is no UTF-8"
    except json.JSONDecodeError:
        return "was damaged: it is no JSON"
    except (ValueError, RecursionError) as error:
        return f"was damaged: {error}"
    return body if isinstance(body, dict) else "was damaged: it is no JSON object"


def authentic(body: Mapping[str, Any], raw: bytes) -> tuple[str | None, bool]:
    """Whether a line's hash vouches for its content; the signature is judged later, when the file's key is known.

    Args:
        body: the parsed line.
        raw: its bytes, without the newline.

    Returns:
        What is wrong with the line taken alone (None: nothing), and whether its hash is that of its content.
    """
    try:
        right, straight = digest(body), canonical(body) == raw
    except (ValueError, RecursionError):
        return "was damaged: it cannot be serialised", False
    for name in ("hash", "sig", "seq", "prev", "owner"):
        if name not in body:
            return f"was edited or is no ledger line: it lacks the key {name!r}", False
    if body["hash"] != right:
        return "was edited: its hash is not that of its content", False
    for name in ("seq", "prev", "owner"):
        if text := COMMON[name](body[name]):
            return f"is no ledger line: {name} {text}", False
    return (None if straight else "is not in canonical form (spaces, order of keys, escapes)"), True
