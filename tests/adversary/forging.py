"""Ways to change a finished directory, each with what it is called: every file, every line, every value of it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

OPEN = {"log.txt"}  # what the seal cannot cover, and the audit names
Files = dict[str, bytes]
Mutation = tuple[str, Callable[[Path], None]]


def written(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(data) and None


def digit(text: bytes) -> bytes | None:
    """Another digit in place of the last one; None where there is none."""
    at = max((m.start() for m in re.finditer(rb"[0-9]", text)), default=None)
    return None if at is None else text[:at] + (b"1" if text[at : at + 1] != b"1" else b"2") + text[at + 1 :]


def is_open(name: str) -> bool:
    return name.rpartition("/")[2] in OPEN


def lines_of(files: Files) -> Iterator[Mutation]:
    """Every line of every file of lines deleted, doubled, edited, moved, and all after it cut off."""
    for name, data in files.items():
        if name.endswith((".safetensors", ".html")) or is_open(name):
            continue
        lines = data.split(b"\n")
        for at in range(len(lines) - 1):
            rest = lines[:at], lines[at + 1 :]
            ways = {"cut": lines[:at], "deleted": [*rest[0], *rest[1]], "twice": [*lines[: at + 1], *lines[at:]]}
            ways["moved"] = [*rest[0], *rest[1][:1], lines[at], *rest[1][1:]]
            if (other := digit(lines[at])) is not None:
                ways["edited"] = [*rest[0], other, *rest[1]]
            for way, changed in ways.items():
                if (text := b"\n".join(changed)) != data:
                    yield f"{name} line {at + 1} {way}", written(name, text)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from leaves(item, (*path, key))


def values_of(files: Files) -> Iterator[Mutation]:
    """Every value in every JSON object: removed, and another in its place; every name of the top there twice."""
    for name in files:
        if not name.endswith(".json") or not isinstance(tree := json.loads(files[name]), dict):
            continue
        found = list(leaves(tree))
        for path in found[:: max(1, len(found) // 40)]:
            for way in ("removed", "changed"):
                other = json.loads(files[name])
                inside = other
                for key in path[:-1]:
                    inside = inside[key]
                before = inside[path[-1]]
                if way == "removed":
                    del inside[path[-1]]
                else:
                    inside[path[-1]] = before + 1 if isinstance(before, int | float) else f"{before}x"
                yield f"{name} {path} {way}", written(name, json.dumps(other, indent=2).encode() + b"\n")
        for key in list(tree)[:8]:
            yield (
                f"{name} {key} twice",
                written(name, b"{" + json.dumps(key).encode() + b": 0," + files[name].lstrip()[1:]),
            )


def words_of(files: Files) -> Iterator[Mutation]:
    """Prose: each number and some words of the statement and of the page."""
    for name, data in files.items():
        if not name.endswith((".md", ".html")):
            continue
        places = list(re.finditer(rb"[0-9]+\.[0-9]+|seeded|not|server|example|every", data))
        for match in places[:: max(1, len(places) // 25)]:
            other = b"0.01" if match.group()[:1].isdigit() else b"never"
            yield f"{name} at {match.start()}", written(name, data[: match.start()] + other + data[match.end() :])
        if name.endswith("PRIVACY.md"):
            hidden = b"<!--\n" + data + b"\n-->\n| client-0 | 0.0100 | 1e-05 | 2 | 0 | 0 | - |\n"
            yield f"{name} hidden in a comment", written(name, hidden)
            yield f"{name} entities", written(name, data + b"&#124; client-0 &#124; 0.0100 &#124;\n")


def bytes_of(files: Files, count: int) -> Iterator[Mutation]:
    """Some bytes of every file, each with one bit the other way."""
    rng = random.Random(5)
    for name, data in files.items():
        for at in sorted(rng.sample(range(len(data)), min(count, len(data)))) if not is_open(name) else ():
            other = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            yield f"{name} byte {at}", written(name, other)


def files_of(files: Files, outside: Path, roots: Sequence[str] = ("",)) -> Iterator[Mutation]:
    """Every file gone, empty, longer, another one, a link, a pipe, a directory, and vast; and files that nobody made.

    ``roots``: what the name of a run's files begins with.
    """
    names = list(files)

    def special(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
        def change(root: Path) -> None:
            (root / name).unlink(missing_ok=True)
            make(root / name)

        return change

    for at, name in enumerate(names):
        copy = outside / name.replace("/", "_")
        copy.write_bytes(files[name])
        yield f"{name} a link", special(name, lambda p, copy=copy: p.symlink_to(copy))
        yield f"{name} a pipe", special(name, lambda p: os.mkfifo(p))
        if is_open(name):
            continue
        yield f"{name} a directory", special(name, lambda p: p.mkdir())
        yield f"{name} gone", special(name, lambda p: None)
        other = {"empty": b"", "longer": files[name] + b"\n", "another": files[names[at - 1]]}
        yield from ((f"{name} {way}", written(name, data)) for way, data in other.items() if data != files[name])
        yield f"{name} vast", special(name, lambda p: (p.touch(), os.truncate(p, 2**35)))
    for root in roots:
        for name in ("adapter/extra.bin", "adapter/more/extra.bin", "adapter.unsealed/x", "ledger/zz.jsonl"):
            yield f"{root}{name} added", added(root + name, b"x")
        yield (
            f"{root}: a ledger of nobody",
            added(f"{root}ledger/client-9.jsonl", files[f"{root}ledger/client-0.jsonl"]),
        )
        for name in ("adapter/linked", "linked", "ledger/linked.jsonl", "personal"):
            yield f"{root}{name} linked", special(root + name, lambda p: p.symlink_to(outside))
        yield f"{root}: a pipe among the ledgers", special(f"{root}ledger/zz.jsonl", lambda p: os.mkfifo(p))
        yield f"{root}: the adapter elsewhere", moved_away(f"{root}adapter", outside / f"{root}adapter")


def moved_away(name: str, target: Path) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        (root / name).rename(target)
        (root / name).symlink_to(target)

    return change


def added(name: str, data: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return change


def together(files: Files) -> Iterator[Mutation]:
    """Several files changed so that they fit: a client dropped, rounds cut, a run that claims to be unfinished."""
    result = json.loads(files["result.json"])
    ledgers = [name for name in files if name.startswith("ledger/")]

    def claims(**more: Any) -> bytes:
        return json.dumps(result | more, indent=2).encode() + b"\n"

    for client in result["clients"]:
        rest = {name: entry for name, entry in result["clients"].items() if name != client}
        card = b"\n".join(line for line in files["PRIVACY.md"].split(b"\n") if client.encode() not in line)

        def drop(root: Path, client: str = client, rest: Any = rest, card: bytes = card) -> None:
            (root / "ledger" / f"{client}.jsonl").unlink()
            (root / "result.json").write_bytes(claims(clients=rest))
            (root / "PRIVACY.md").write_bytes(card)

        yield f"{client} dropped", drop
    counts = {name: files[name].count(b"\n") for name in [*ledgers, "receipts.jsonl"]}
    for status in ("interrupted", "failed", "completed", "budget-exhausted", "", None):
        for keep in range(max(counts.values())):

            def cut(root: Path, status: Any = status, keep: int = keep) -> None:
                for name in counts:
                    lines = files[name].split(b"\n")[:keep]
                    if lines:
                        (root / name).write_bytes(b"\n".join(lines) + b"\n")
                    else:
                        (root / name).unlink()
                (root / "result.json").write_bytes(claims(status=status, epsilon=0.0))

            yield f"everything cut to {keep} lines, status {status}", cut


def mutations(files: Files, outside: Path) -> list[Mutation]:
    """Of a run."""
    single = [*lines_of(files), *values_of(files), *words_of(files), *bytes_of(files, 8)]
    return [*single, *files_of(files, outside), *together(files)]


def replace_tree(root: Path, files: Files) -> None:
    """Make a directory hold these files and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
