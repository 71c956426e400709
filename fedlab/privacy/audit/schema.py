"""What a ledger line may contain: exact keys and value types per type, as ``docs/ledger.md`` fixes them.

A check is a function from a value to what is wrong with it, or None. Nothing here raises for any JSON value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], str | None]
ZEROS = "0" * 64
# keys that lines of earlier editions lack, by type
LATER: Mapping[str, frozenset[str]] = {
    "PLAN": frozenset({"configuration", "releases", "shared"}),
    "START": frozenset({"config"}),
    "ROUND": frozenset({"before"}),
}
MOST = 2**53  # integers stay below: every JSON reader keeps them exactly


def _shown(value: Any) -> str:
    """A value for a message: short, printable, on one line."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _hex(least: int, most: int | None = None) -> Check:
    pattern = re.compile(rf"[0-9a-f]{{{least},{most or least}}}")
    size = f"{least}" if most is None else f"{least} to {most}"

    def check(value: Any) -> str | None:
        good = isinstance(value, str) and pattern.fullmatch(value)
        return None if good else f"must be {size} lower-case hex digits, got {_shown(value)}"

    return check


def _integer(least: int, most: int = MOST - 1) -> Check:
    def check(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        end = "2^53" if most == MOST - 1 else str(most)
        return None if good else f"must be an integer from {least} to {end}, got {_shown(value)}"

    return check


def number(text: Any) -> float | None:
    """The double that a hexadecimal string stands for, if it is finite and the string is its one spelling
    (``float.hex``).
    """
    if not isinstance(text, str) or len(text) > 40:
        return None
    try:
        value = float.fromhex(text)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and value.hex() == text else None


def _real(low: float, high: float = math.inf, above: bool = False) -> Check:
    """A real number in [low, high], or in (low, high] with ``above``; minus zero is none."""

    def check(value: Any) -> str | None:
        found = number(value)
        if found is None:
            return f"must be a finite real in hexadecimal form, got {_shown(value)}"
        inside = (found > low or (found == low and not above and math.copysign(1, found) > 0)) and found <= high
        return (
            None
            if inside
            else (
                f"must be {'>' if above else '>='} {low:g}{f' and <= {high:g}' if high < math.inf else ''}, got"
                f" {found:g}"
            )
        )

    return check


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else f"must be a string, got {_shown(value)}"


def _name(value: Any) -> str | None:
    return None if isinstance(value, str) and value else f"must be a name, got {_shown(value)}"


def _one_of(*words: str) -> Check:
    return lambda value: (
        None if isinstance(value, str) and value in words else f"must be one of {', '.join(words)}, got {_shown(value)}"
    )


def _exactly(expected: int | str) -> Check:
    def check(value: Any) -> str | None:
        return (
            None
            if type(value) is type(expected) and value == expected
            else f"must be {_shown(expected)}, got {_shown(value)}"
        )

    return check


def _or_null(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _each(key: Check, item: Check) -> Check:
    """An object of any size."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"must be an object, got {_shown(value)}"
        wrong = [f"{_shown(k)} {text}" for k, v in value.items() if (text := key(k) or item(v))]
        return wrong[0] if wrong else None

    return check


def _list(item: Check) -> Check:
    def check(value: Any) -> str | None:
        if not isinstance(value, list):
            return f"must be a list, got {_shown(value)}"
        return next((text for v in value if (text := item(v))), None)

    return check


def _either(now: Check, before: Check) -> Check:
    """As lines are written now, or as the first edition wrote them."""
    return lambda value: now(value) if now(value) is None or before(value) is not None else None


def _head(value: Any) -> str | None:
    good = isinstance(value, list) and len(value) == 2 and not _integer(0)(value[0]) and not _hex(64)(value[1])
    return None if good else f"must be [seq, hash], got {_shown(value)}"


def _record(keys: Mapping[str, Check], later: frozenset[str] = frozenset()) -> Check:
    """An object with exactly these keys; those of ``later`` may be missing."""

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"must be an object, got {_shown(value)}"
        if missing := sorted(keys.keys() - value.keys() - later):
            return f"lacks the key {missing[0]!r}"
        if extra := sorted(value.keys() - keys.keys()):
            return f"has the unknown key {_shown(extra[0])}"
        return next((f"{key}: {text}" for key in keys if key in value and (text := keys[key](value[key]))), None)

    return check


def _sampler(value: Any) -> str | None:
    known = isinstance(value, str) and value in ("poisson", "poisson_discrete", "fixed_wor", "shuffle", "full")
    return None if known else f"unknown sampler {_shown(value)}, which cannot be accounted for"


def _time(value: Any) -> str | None:
    good = isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value, re.ASCII)
    return None if good else f"must be a UTC time like 2026-11-23T14:20:01Z, got {_shown(value)}"


def _path(value: Any) -> str | None:
    """A file inside the run directory."""
    good = isinstance(value, str) and not {"", ".", ".."} & set(value.split("/")) and "\0" not in value
    return None if good else f"must be a path inside the run directory, got {_shown(value)}"


def _sealed(value: Any) -> str | None:
    good = isinstance(value, list) and len(value) == 2 and not _integer(0)(value[0]) and not _hex(64)(value[1])
    return None if good else f"must be [bytes, SHA-256], got {_shown(value)}"


_HASH, _KEY, _DIGEST, _COUNT = _hex(64), _hex(64), _hex(32, 128), _integer(1)
EVENT = _record({"sampler": _sampler, "q": _real(0, 1), "sigma": _real(0), "steps": _integer(0)})
SHARED = _record(
    {
        "survivors": _COUNT,
        "colluding": _integer(0),
        "dimension": _COUNT,
        "bits": _integer(1, 40),
        "share": _real(0, above=True),
    }
)
COMMON: Mapping[str, Check] = {
    "v": _exactly(1), "seq": _integer(0), "prev": _HASH, "type": _text, "time": _time, "run": _hex(32), "owner": _name,
    "dataset": _HASH, "hash": _HASH, "sig": _hex(128),
}  # fmt: skip
SERVER: Mapping[str, Mapping[str, Check]] = {
    "START": {"key": _KEY, "unit": _one_of("example", "client"), "clients": _each(_name, _KEY), "config": _HASH},
    "RECEIPT": {"key": _KEY, "round": _COUNT, "client": _name, "number": _integer(0), "head": _HASH, "out": _DIGEST},
    "ROUND": {
        "round": _COUNT,
        "before": _DIGEST,
        "in": _DIGEST,
        "out": _DIGEST,
        "clients": _either(_each(_name, _or_null(_DIGEST)), _list(_name)),
    },
    "FINAL": {
        "heads": _each(_name, _head),
        "files": _either(_each(_path, _sealed), _each(_path, _HASH)),
        "state": _DIGEST,
        "status": _name,
    },
}


def problem(line: Mapping[str, Any], types: Mapping[str, Mapping[str, Check]]) -> str | None:
    """What keeps a line from being one of ``types``, or None."""
    kind = line.get("type")
    if not isinstance(kind, str) or kind not in types:
        return f"unknown type {_shown(kind)}" if "type" in line else "lacks the key 'type'"
    text = _record({**COMMON, **types[kind]}, LATER.get(kind, frozenset()))(dict(line))
    return None if text is None else f"{kind} {text}"


def _receipt(value: Any) -> str | None:
    return (
        problem(value, {"RECEIPT": SERVER["RECEIPT"]})
        if isinstance(value, dict)
        else f"must be an object, got {_shown(value)}"
    )


CLIENT: Mapping[str, Mapping[str, Check]] = {
    "PLAN": {
        "key": _KEY, "unit": _one_of("example", "client"), "relation": _one_of("add_remove"), "event": EVENT,
        "clip": _real(0, above=True), "normaliser": _real(0, above=True), "delta": _real(0, 1), "n": _COUNT,
        "participations": _integer(0),
        "scope": _HASH, "budget": _or_null(_record({"epsilon": _real(0), "delta": _real(0, 1)})),
        "noise": _one_of("seeded", "secure"),
        "content": _or_null(_HASH), "configuration": _HASH, "releases": _list(_name), "code": _each(_name, _text),
        "shared": _or_null(SHARED),
    },
    "CHARGE": {"round": _COUNT, "plan": _HASH, "event": EVENT, "in": _DIGEST, "filter": _one_of("rdp", "pld", "none")},
    "COMMIT": {"charge": _HASH, "steps": _integer(0), "out": _DIGEST},
    "ABORT": {"charge": _HASH, "reason": _text},
    "RELEASE": {"commit": _HASH, "receipt": _receipt},
    "REFUSE": {
        "round": _integer(0),
        "kind": _one_of("budget-exhausted", "plan-mismatch", "participations", "policy", "repeated"), "reason": _text,
    },
    "RECOVER": {"bytes": _COUNT, "lost": _HASH},
    "CLOSE": {"plan": _HASH, "charges": _integer(0)},
}  # fmt: skip
