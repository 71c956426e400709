"""The files of a run directory as an audit may touch them: regular ones inside it, of bounded size, and nothing else.

Guarantees for any tree whatever: no link is followed, no pipe or device is opened, nothing larger than its limit is
read, and no call waits for anybody.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

MOST_ENTRIES, MOST_DEPTH = 200_000, 32
TEXT, TABLE = 2**24, 2**29  # bytes that are read of a file that people read, and of one that has a line per event
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}


class Unreadable(Exception):
    """Why a file was not read."""


@dataclass(frozen=True)
class RunFiles:
    """What lies below a directory: regular files with their sizes, folders, and what is neither."""

    root: Path
    sizes: dict[str, int] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    odd: dict[str, str] = field(default_factory=dict)  # path → what it is

    @classmethod
    def below(cls, root: Path) -> RunFiles:
        """Look at every entry below ``root`` without opening any."""
        found = cls(root)
        for name, kind in _walk(root, "", 0):
            if len(found.sizes) + len(found.folders) + len(found.odd) >= MOST_ENTRIES:
                found.odd["."] = f"more than {MOST_ENTRIES} entries"
                break
            if isinstance(kind, str):
                found.odd[name] = kind
            elif stat.S_ISDIR(kind.st_mode):
                found.folders.add(name)
            elif stat.S_ISREG(kind.st_mode):
                found.sizes[name] = kind.st_size
            else:
                found.odd[name] = KINDS.get(stat.S_IFMT(kind.st_mode), "no regular file")
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def under(self, folder: str) -> list[str]:
        """Names of the regular files anywhere below a folder, sorted."""
        return sorted(name for name in self.sizes if name.startswith(folder + "/"))

    def read(self, name: str, most: int) -> bytes | None:
        """A file's bytes; None if there is none. Raises Unreadable for more than ``most`` bytes, or what is no file."""
        if name in self.folders or name in self.odd:
            raise Unreadable(f"it is {self.odd.get(name, 'a directory')}")
        if name not in self.sizes:
            return None
        if self.sizes[name] > most:
            raise Unreadable(f"it has {self.sizes[name]} bytes, at most {most} are read")
        with self._open(name) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise Unreadable(f"it has more than {most} bytes")
        return data

    def sha256(self, name: str) -> str:
        """SHA-256 (hex) of a file that is there. Raises Unreadable."""
        with self._open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _open(self, name: str) -> BufferedReader:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(self.root / name, flags)
        except OSError as error:
            raise Unreadable(str(error.strerror)) from None
        file = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # put there since
            file.close()
            raise Unreadable("it is no regular file")
        return file


def _walk(root: Path, inside: str, depth: int) -> Iterator[tuple[str, os.stat_result | str]]:
    """(name, what it is) of every entry, folders before what is in them; a text for what cannot be looked at."""
    try:
        entries = sorted(os.scandir(root / inside if inside else root), key=lambda entry: entry.name)
    except OSError as error:
        yield inside or ".", f"a directory that cannot be read ({error.strerror})"
        return
    for entry in entries:
        name = f"{inside}/{entry.name}" if inside else entry.name
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError as error:
            yield name, f"something that cannot be looked at ({error.strerror})"
            continue
        yield name, found
        if stat.S_ISDIR(found.st_mode):
            if depth >= MOST_DEPTH:
                yield name + "/…", f"more than {MOST_DEPTH} directories deep"
            else:
                yield from _walk(root, name, depth + 1)
