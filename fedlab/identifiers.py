"""Identifiers: names that become file names, keys of JSON objects and parts of messages.

One grammar for all of them: letters, digits, ``.``, ``_`` and ``-``, beginning with a letter or digit and not ending
with a dot, at most 64 characters. A client's name as its owner wrote it becomes an identifier by ``identifier``.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from fedlab.errors import ConfigError

LONGEST = 64
PATTERN = rf"^[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,{LONGEST - 2}}}[A-Za-z0-9_-])?$"
RESERVED = ("server",)  # the server's own ledger is server.jsonl
_DIGITS = 12  # of the hash that tells spellings apart
_SPELT = re.compile(rf"--[0-9a-f]{{{_DIGITS}}}$")  # what a changed spelling ends with
_WHOLE = re.compile(PATTERN)


def is_identifier(text: str) -> bool:
    """Whether a text follows the grammar and is not reserved."""
    return _WHOLE.fullmatch(text) is not None and text.lower() not in RESERVED


def checked_identifier(text: str, what: str) -> str:
    """The text itself. Raises ConfigError that begins with ``what`` unless it is an identifier: for what comes from
    outside, before it becomes a file's name.
    """
    if not is_identifier(text):
        raise ConfigError(
            f"{what} = {text[: LONGEST + 1]!r} is no identifier: letters, digits, '.', '_' and '-', beginning with a"
            f" letter or digit, at most {LONGEST} of them, and not {', '.join(RESERVED)}"
        )
    return text


def identifier(name: str) -> str:
    """A name as an identifier. A name that is one stays as it is; another is spelt with what letters and digits it has,
    and a part of its SHA-256: ``"St. Mary's"`` → ``"St.-Mary-s--"`` and 12 hexadecimal digits.

    Different names have different identifiers. Raises ValueError for the empty name.
    """
    if not name:
        raise ValueError("a name must not be empty")
    if is_identifier(name) and not _SPELT.search(name):
        return name
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]", "-", plain)).strip(".-_")
    number = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]
    return f"{readable[: LONGEST - _DIGITS - 2].rstrip('.-') or 'x'}--{number}"


def identifiers(names: Iterable[str], what: str) -> dict[str, str]:
    """Name → identifier of every name, in the order given.

    Raises ConfigError, beginning with ``what``, for an empty name and for two that a disk which ignores case would take
    for one.
    """
    found: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if not name:
            raise ConfigError(f"{what} has an empty name")
        found[name] = identifier(name)
        other = seen.setdefault(found[name].lower(), name)
        if other != name:
            raise ConfigError(
                f"{what} has both {other!r} and {name!r}, which differ only in case: their files would be one on some"
                " disks; write them alike, or tell them apart"
            )
    return found
