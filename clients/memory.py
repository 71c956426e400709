"""What a client on a machine of its own remembers of a run between messages: on its disk, so that a trainer that is
started again goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from pathlib import Path

from fedlab.files import below, write


class DiskMemory(MutableMapping[str, str]):
    """Short texts by name, a file each, written whole or not at all.

    Args:
        directory: where they lie; made when the first one is kept.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __getitem__(self, name: str) -> str:
        try:
            return below(self._directory, name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, text: str) -> None:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(below(self._directory, name), text, mode=0o600)

    def __delitem__(self, name: str) -> None:
        try:
            below(self._directory, name).unlink()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        if self._directory.is_dir():
            yield from sorted(path.name for path in self._directory.iterdir() if not path.name.startswith("."))

    def __len__(self) -> int:
        return sum(1 for _ in self)
