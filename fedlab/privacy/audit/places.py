"""Whether authentic lines of one file stand where their owner wrote them: duplicates, moved lines, forks and gaps.

A finding names the line that was touched and leaves its intact neighbours in peace. A line in a place of its own is
named by its number in the file (from 1), its place by its ``seq`` (from 0).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlab.privacy.audit.schema import ZEROS

Lines = Mapping[int, Mapping[str, Any]]  # line number → content


@dataclass(frozen=True)
class Places:
    """What is wrong with the places of a file's lines."""

    faults: Mapping[int, str]  # line number → what was done to that line
    duplicates: frozenset[int]
    gap: bool  # whether lines are missing


def check_places(sound: Lines, readable: set[int]) -> Places:
    """Compare the order of lines in the file with the order that their ``seq`` and ``prev`` state.

    Args:
        sound: the authentic lines.
        readable: numbers of all lines that could be parsed; one that could not may have had any ``seq``.
    """
    duplicates = _duplicates(sound)
    rest = [n for n in sorted(sound) if n not in duplicates]
    kept = _increasing(rest, [sound[n]["seq"] for n in rest])
    strays = [n for n in rest if n not in set(kept)]
    faults = {n: f"is a duplicate of line {earlier}" for n, earlier in duplicates.items()} | _moved(sound, kept, strays)
    broken, gap = _joints(sound, kept, strays, readable)
    return Places(faults | broken, frozenset(duplicates), gap)


def _duplicates(sound: Lines) -> dict[int, int]:
    """Line number → the earlier line with the same hash."""
    seen: dict[str, int] = {}
    found = {}
    for n in sorted(sound):
        if (earlier := seen.setdefault(sound[n]["hash"], n)) != n:
            found[n] = earlier
    return found


def _moved(sound: Lines, kept: Sequence[int], strays: Sequence[int]) -> dict[int, str]:
    """What is wrong with lines outside the increasing order: a fork where their place is taken, else moved."""
    in_place = {sound[n]["seq"]: n for n in kept}
    found = {}
    for n in strays:
        seq = sound[n]["seq"]
        if (twin := in_place.get(seq)) is not None:
            found[n] = f"contradicts line {twin}: two different lines with seq {seq}, so the ledger was forked"
        else:
            found[n] = f"was moved: it carries seq {seq}, which is the place of line {seq + 1}"
    return found


def _joints(
    sound: Lines, kept: Sequence[int], strays: Sequence[int], readable: set[int]
) -> tuple[dict[int, str], bool]:
    """What is wrong between each line in place and the one before it, and whether lines are missing between any two."""
    found: dict[int, str] = {}
    gap = False
    before, seq_before, hash_before = 0, -1, ZEROS
    for n in kept:
        seq = sound[n]["seq"]
        between = [m for m in range(before + 1, n) if m not in sound]  # damaged or foreign, named already
        elsewhere = len({sound[m]["seq"] for m in strays if seq_before < sound[m]["seq"] < seq})
        lost = seq - seq_before - 1 - len(between) - elsewhere
        if lost > 0 and all(m in readable for m in between):
            gap = True
            which = f"seq {seq_before + 1}" if seq == seq_before + 2 else f"between seq {seq_before} and seq {seq}"
            found[n] = f"follows a gap: {lost} missing line{'s' if lost > 1 else ''} before it ({which})"
        elif seq == seq_before + 1 and sound[n]["prev"] != hash_before:
            found[n] = (
                f"does not continue line {before}: its prev is another hash"
                if before
                else "is not the first of its chain: prev is not zeros"
            )
        before, seq_before, hash_before = n, seq, str(sound[n]["hash"])
    return found, gap


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
