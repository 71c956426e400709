"""One ledger file: is every line the one that its owner wrote, and where its owner wrote it? See ``docs/ledger.md``.

Guarantees of ``read_chain`` for any bytes whatever: it does not raise; a file without findings consists of canonical
lines with right hashes, all signed by one key, numbered without a gap, each naming its predecessor. A finding names the
line that was touched; its intact neighbours are left in peace. That the end was cut off, or an older copy put back, no
chain can show: see ``receipts.py``. What the lines *mean* is checked in ``rules.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedlab.privacy.audit.schema import COMMON, ZEROS, Check, problem

PREFIX = b"fedlab-ledger-v1:"


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


@dataclass(frozen=True)
class Chain:
    """A verified file. ``lines``: the usable ones in the order of their ``seq``, without duplicates and foreign ones.

    ``holes``: lines are missing or could not be relied upon, so that a reference which leads nowhere is no finding of
    its own.
    ``unreadable``: lines of the owner that could not be interpreted, so that what they spent is unknown.
    """

    where: str
    owner: str
    key: str | None
    size: int
    lines: tuple[Line, ...]
    findings: tuple[Finding, ...]
    holes: bool
    swapped: bool
    unreadable: int

    def of(self, *kinds: str) -> list[Line]:
        return [line for line in self.lines if line.kind in kinds]


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


def _authentic(body: dict[str, Any], raw: bytes) -> tuple[str | None, bool]:
    """What is wrong with a line taken alone, and whether its hash vouches for its content;
    the signature comes later.
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
    if text := next(
        (f"{name} {text}" for name in ("seq", "prev", "owner") if (text := COMMON[name](body[name]))), None
    ):
        return f"is no ledger line: {text}", False
    return (None if straight else "is not in canonical form (spaces, order of keys, escapes)"), True


def _file_key(
    data: bytes, bodies: Mapping[int, dict[str, Any]], vouched: set[int], first: str, expected: str | None
) -> str | None:
    """The key that the file is signed with: its first line's if that line is authentic, else the one under which most
    lines are.

    None if the first line is damaged and no key that the file or the caller names fits any line: then signatures cannot
    be judged.
    """
    start = bodies.get(1, {})
    if 1 in vouched and start.get("type") == first and signed(start, start.get("key")):
        return str(start["key"])
    named = (match.decode() for match in re.findall(rb'"key":"([0-9a-f]{64})"', data))
    counts = {
        key: sum(signed(bodies[n], key) for n in vouched)
        for key in list(dict.fromkeys([*named, *([expected] if expected else [])]))[:8]
    }
    best = max(counts, key=lambda key: counts[key], default=None)
    return best if best is not None and (counts[best] or (1 in vouched and start.get("type") == first)) else None


def read_chain(
    data: bytes,
    where: str,
    owner: str,
    types: Mapping[str, Mapping[str, Check]],
    first: str,
    expected: str | None = None,
) -> Chain:
    """Verify the bytes of one file that should belong to ``owner``.

    ``first`` is the type that names the key; ``expected`` is a hint.
    """
    pieces = data.split(b"\n")
    torn = pieces.pop()
    raws = [*pieces, torn] if torn else pieces
    faults: dict[int, str] = {}  # line number → what was done to that line
    bodies: dict[int, dict[str, Any]] = {}
    vouched: set[int] = set()  # lines whose hash is that of their content
    for number, raw in enumerate(raws, start=1):
        body = parse(raw)
        if isinstance(body, str):
            faults[number] = body
            continue
        bodies[number] = body
        text, is_vouched = _authentic(body, raw)
        if text:
            faults[number] = text
        if is_vouched:
            vouched.add(number)
    if torn:
        faults[len(raws)] = f"is torn: {len(torn)} bytes without a newline at the end"
    key = _file_key(data, bodies, vouched, first, expected)
    whole = [] if raws else [Finding(where, None, "the file is empty")]
    owners = Counter(bodies[n]["owner"] for n in sorted(vouched))
    swapped = bool(owners) and owner not in owners
    if swapped:
        other = owners.most_common(1)[0][0]
        whole.append(Finding(where, None, f"the file was swapped: its lines belong to {other!a}, not to {owner!a}"))
        owner = other
    strangers = {n: text for n in sorted(vouched) if (text := _stranger(bodies[n], owner, key, first))}
    faults |= strangers
    foreign = {n for n, text in strangers.items() if "foreign" in text}
    sound = {n: bodies[n] for n in sorted(vouched) if n not in strangers}
    misplaced, duplicates, gap = _order(sound, set(bodies))
    faults |= {n: text for n, text in misplaced.items() if n not in faults}
    lines, unreadable = [], len(raws) - len(bodies)
    for n, body in bodies.items():
        if n in foreign or n in duplicates:
            continue
        text = problem(body, types)
        if text is None:
            lines.append(Line(n, body, n in sound))
            continue
        unreadable += 1
        if n in sound:
            faults[n] = f"{faults[n]}; {text}" if n in faults else text
    faults |= _datasets(sound, faults)
    if raws and key is None and 1 not in faults:
        faults[1] = f"no key is known for this file: its first line must be a {first}"
    findings = [*whole, *(Finding(where, n, faults[n]) for n in sorted(faults))]
    holes = gap or swapped or not raws or unreadable > 0 or len(sound) < len(raws)
    ordered = tuple(sorted(lines, key=lambda line: (line.seq, line.number)))
    return Chain(where, owner, key, len(raws), ordered, tuple(findings), holes, swapped, unreadable)


def _stranger(body: Mapping[str, Any], owner: str, key: str | None, first: str) -> str | None:
    """What is wrong with a line that is consistent in itself, if the file's owner did not sign it."""
    if body["owner"] != owner:
        return f"is foreign: it belongs to {body['owner']!a}"
    if key is None or signed(body, key):
        return None
    if body.get("type") == first and body.get("key") != key and signed(body, body.get("key")):
        return "is foreign: it is signed with another key than the file's"
    return "bad signature: not by the file's key (edited and hashed again, or written by somebody else)"


def _datasets(sound: Mapping[int, Mapping[str, Any]], faults: Mapping[int, str]) -> dict[int, str]:
    """One file, one dataset."""
    known = [body["dataset"] for body in sound.values() if not COMMON["dataset"](body.get("dataset"))]
    text = "is about another dataset than the file's first line"
    return {n: text for n, body in sound.items() if n not in faults and known and body.get("dataset") != known[0]}


def _order(sound: Mapping[int, Mapping[str, Any]], readable: set[int]) -> tuple[dict[int, str], set[int], bool]:
    """What is wrong with the places of authentic lines; which of them are duplicates; whether lines are missing."""
    found: dict[int, str] = {}
    seen: dict[str, int] = {}
    duplicates: set[int] = set()
    for n in sorted(sound):
        if (earlier := seen.setdefault(sound[n]["hash"], n)) != n:
            found[n] = f"is a duplicate of line {earlier}"
            duplicates.add(n)
    rest = [n for n in sorted(sound) if n not in duplicates]
    kept = _increasing(rest, [sound[n]["seq"] for n in rest])
    in_place = {sound[n]["seq"]: n for n in kept}
    strays = [n for n in rest if n not in set(kept)]
    for n in strays:
        seq = sound[n]["seq"]
        twin = in_place.get(seq)
        found[n] = (
            f"contradicts line {twin}: two different lines with seq {seq}, so the ledger was forked"
            if twin is not None
            else f"was moved: it carries seq {seq}, which is the place of line {seq + 1}"
        )
    missing = False
    before, seq_before, hash_before = 0, -1, ZEROS
    for n in kept:
        seq = sound[n]["seq"]
        between = [m for m in range(before + 1, n) if m not in sound]  # damaged or foreign, named already
        elsewhere = len({sound[m]["seq"] for m in strays if seq_before < sound[m]["seq"] < seq})
        lost = seq - seq_before - 1 - len(between) - elsewhere
        if lost > 0 and all(m in readable for m in between):
            missing = True
            which = f"seq {seq_before + 1}" if seq == seq_before + 2 else f"between seq {seq_before} and seq {seq}"
            found[n] = f"follows a gap: {lost} missing line{'s' if lost > 1 else ''} before it ({which})"
        elif seq == seq_before + 1 and sound[n]["prev"] != hash_before:
            found[n] = (
                f"does not continue line {before}: its prev is another hash"
                if before
                else "is not the first of its chain: prev is not zeros"
            )
        before, seq_before, hash_before = n, seq, str(sound[n]["hash"])
    return found, duplicates, missing


def _increasing(numbers: Sequence[int], seqs: Iterable[int]) -> list[int]:
    """The longest selection of lines whose seq strictly increases: what is outside of it was moved, and as little as
    possible is.
    """
    tails: list[int] = []  # the smallest seq that ends a selection of each length
    ends: list[int] = []  # and the line that carries it
    previous: dict[int, int | None] = {}
    for n, seq in zip(numbers, seqs, strict=True):
        at = bisect_left(tails, seq)
        previous[n] = ends[at - 1] if at else None
        tails[at : at + 1], ends[at : at + 1] = [seq], [n]
    chosen: list[int] = []
    last = ends[-1] if ends else None
    while last is not None:
        chosen.append(last)
        last = previous[last]
    return chosen[::-1]
