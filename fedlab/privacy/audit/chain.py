"""One ledger file: is every line the one that its owner wrote, and where its owner wrote it? See ``docs/ledger.md``.

Guarantees of ``read_chain`` for any bytes whatever: it does not raise; a file without findings consists of canonical
lines with right hashes, all signed by one key, numbered without a gap, each naming its predecessor. A finding names the
line that was touched; its intact neighbours are left in peace. That the end was cut off, or an older copy put back, no
chain can show: see ``receipts.py``. What the lines *mean* is checked in ``rules.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlab.privacy.audit.lines import Finding, Line, authentic, parse, signed
from fedlab.privacy.audit.places import check_places
from fedlab.privacy.audit.schema import COMMON, Check, problem


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


@dataclass
class _File:
    """A file as it lies, with what is known of each line so far. Lines are counted from 1."""

    data: bytes
    size: int  # lines, a torn one included
    bodies: dict[int, dict[str, Any]] = field(default_factory=dict)  # lines that could be parsed
    vouched: set[int] = field(default_factory=set)  # lines whose hash is that of their content
    faults: dict[int, str] = field(default_factory=dict)  # what was done to a line


def read_chain(
    data: bytes,
    where: str,
    owner: str,
    types: Mapping[str, Mapping[str, Check]],
    first: str,
    expected: str | None = None,
) -> Chain:
    """Verify the bytes of one file that should belong to ``owner``.

    Args:
        data: the file.
        where: its name in findings.
        owner: whose lines they should be.
        types: what a line may contain, per type.
        first: the type of the first line, which names the key.
        expected: a key that the file may be signed with; a hint for a file whose first line is damaged.

    Returns:
        The chain, for any bytes; its findings name every line that is not as its owner wrote it.
    """
    file = _parse_lines(data)
    key = _file_key(file, first, expected)
    whole = [] if file.size else [Finding(where, None, "the file is empty")]
    actual = _actual_owner(file, owner)
    if swapped := actual != owner:
        text = f"the file was swapped: its lines belong to {actual!a}, not to {owner!a}"
        whole.append(Finding(where, None, text))
    foreign, forged = _strangers(file, actual, key, first)
    file.faults |= foreign | forged
    sound = {n: file.bodies[n] for n in sorted(file.vouched) if n not in foreign and n not in forged}
    places = check_places(sound, set(file.bodies))
    file.faults |= {n: text for n, text in places.faults.items() if n not in file.faults}
    lines, problems = _typed(file, sound, foreign.keys() | places.duplicates, types)
    for n in problems.keys() & sound.keys():
        file.faults[n] = f"{file.faults[n]}; {problems[n]}" if n in file.faults else problems[n]
    file.faults |= _datasets(sound, file.faults)
    if file.size and key is None and 1 not in file.faults:
        file.faults[1] = f"no key is known for this file: its first line must be a {first}"
    findings = (*whole, *(Finding(where, n, file.faults[n]) for n in sorted(file.faults)))
    unreadable = file.size - len(file.bodies) + len(problems)
    holes = places.gap or swapped or not file.size or unreadable > 0 or len(sound) < file.size
    return Chain(where, actual, key, file.size, lines, findings, holes, swapped, unreadable)


def _parse_lines(data: bytes) -> _File:
    """Every line taken alone: can it be parsed, and does its hash vouch for it?"""
    pieces = data.split(b"\n")
    torn = pieces.pop()
    raws = [*pieces, torn] if torn else pieces
    file = _File(data, len(raws))
    for number, raw in enumerate(raws, start=1):
        body = parse(raw)
        if isinstance(body, str):
            file.faults[number] = body
            continue
        file.bodies[number] = body
        text, vouched = authentic(body, raw)
        if text:
            file.faults[number] = text
        if vouched:
            file.vouched.add(number)
    if torn:
        file.faults[len(raws)] = f"is torn: {len(torn)} bytes without a newline at the end"
    return file


def _file_key(file: _File, first: str, expected: str | None) -> str | None:
    """The key that the file is signed with: its first line's if that line is authentic, else the one under which most
    lines are.

    None if the first line is damaged and no key that the file or the caller names fits any line: then signatures cannot
    be judged.
    """
    start = file.bodies.get(1, {})
    opened = 1 in file.vouched and start.get("type") == first
    if opened and signed(start, start.get("key")):
        return str(start["key"])
    named = (match.decode() for match in re.findall(rb'"key":"([0-9a-f]{64})"', file.data))
    candidates = list(dict.fromkeys([*named, *([expected] if expected else [])]))[:8]
    counts = {key: sum(signed(file.bodies[n], key) for n in file.vouched) for key in candidates}
    best = max(counts, key=lambda key: counts[key], default=None)
    return best if best is not None and (counts[best] or opened) else None


def _actual_owner(file: _File, owner: str) -> str:
    """``owner`` if any authentic line is his or there is none, else whoever has most lines: the file was swapped."""
    owners = Counter(file.bodies[n]["owner"] for n in sorted(file.vouched))
    return str(owners.most_common(1)[0][0]) if owners and owner not in owners else owner


def _strangers(file: _File, owner: str, key: str | None, first: str) -> tuple[dict[int, str], dict[int, str]]:
    """Lines that are consistent in themselves and that the owner did not sign: of somebody else, and forged ones."""
    foreign: dict[int, str] = {}
    forged: dict[int, str] = {}
    for n in sorted(file.vouched):
        body = file.bodies[n]
        if body["owner"] != owner:
            foreign[n] = f"is foreign: it belongs to {body['owner']!a}"
        elif key is None or signed(body, key):
            continue
        elif body.get("type") == first and body.get("key") != key and signed(body, body.get("key")):
            foreign[n] = "is foreign: it is signed with another key than the file's"
        else:
            forged[n] = "bad signature: not by the file's key (edited and hashed again, or written by somebody else)"
    return foreign, forged


def _typed(
    file: _File, sound: Mapping[int, Any], skipped: set[int], types: Mapping[str, Mapping[str, Check]]
) -> tuple[tuple[Line, ...], dict[int, str]]:
    """The lines that conform to their type, in the order of ``seq``, and what keeps the others from it."""
    lines, problems = [], {}
    for n, body in file.bodies.items():
        if n in skipped:
            continue
        if text := problem(body, types):
            problems[n] = text
        else:
            lines.append(Line(n, body, n in sound))
    return tuple(sorted(lines, key=lambda line: (line.seq, line.number))), problems


def _datasets(sound: Mapping[int, Mapping[str, Any]], faults: Mapping[int, str]) -> dict[int, str]:
    """One file, one dataset."""
    known = [body["dataset"] for body in sound.values() if not COMMON["dataset"](body.get("dataset"))]
    text = "is about another dataset than the file's first line"
    return {n: text for n, body in sound.items() if n not in faults and known and body.get("dataset") != known[0]}
