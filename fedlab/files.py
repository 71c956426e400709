"""Files that are written whole or not at all: a temporary file in the same folder, fsync, rename.

Readers see the old file or the new one, also after a crash or a power cut, and never a part. Not for lines that are
appended (``fedlab.privacy.ledger``), nor for folders (``fedlab.data.cache``). What a full disk raises, in whatever
library, becomes ``Unwritable`` with the file's name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from fedlab.errors import Unwritable

# What a system says when a file cannot be written through no fault of who writes it, and what helps.
ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable, or choose another place",
    errno.EACCES: "make it writable, or choose another place",
    errno.EPERM: "make it writable, or choose another place",
    errno.EIO: "look at the disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
ALWAYS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # those that mean it wherever they come from


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the name of ``path`` when the block ends without an error.

    Args:
        path: the file to make or replace; its folder must be there.

    Yields:
        A path in the same folder, of this thread alone. If the block raises, it is removed and ``path`` stays as it is.
    """
    temporary = _temporary(path)
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes, mode: int | None = None) -> None:
    """Make or replace a file; its folder must be there. Text is written as UTF-8.

    ``mode``: its permissions, from before it holds anything; default: those that the umask leaves.
    """
    with replacing(path) as temporary:
        if mode is not None:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT, mode))
        temporary.write_bytes(_bytes(content))


def create(path: Path, content: str | bytes, mode: int = 0o600) -> bool:
    """Make a file that no other process made first, and leave one that is there.

    Args:
        path: the file; its folder must be there.
        content: text (written as UTF-8) or bytes.
        mode: permissions of the new file, before the umask.

    Returns:
        Whether this call made it. Once it returns, the file's name survives a power cut.
    """
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    try:
        with naming(path), os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(_bytes(content))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, it never replaces
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what a full disk raises inside the block, from whatever library, into ``Unwritable`` that names ``path``."""
    try:
        yield
    except Unwritable:
        raise
    except Exception as error:
        problem = disk_problem(error, tuple(ADVICE))
        if problem is None:
            raise
        raise Unwritable(path, os.strerror(problem), ADVICE[problem]) from error


def disk_problem(error: BaseException | None, numbers: tuple[int, ...] = ALWAYS) -> int | None:
    """The number, of ``numbers``, of the system's error that is behind an error; None if there is none.

    safetensors and torch report it in their own exceptions, by its text alone.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return error.errno
        told = str(error)
        for number in numbers if not isinstance(error, OSError) else ():
            if re.search(rf"\bos error {number}\b", told) or os.strerror(number) in told:
                return number
        error = error.__cause__ or error.__context__
    return None


def unwritable(error: BaseException, place: Path | None = None) -> Unwritable | None:
    """What a full disk that is behind an error amounts to; None if there is none.

    ``place``: what to name where the error names no file.
    """
    if isinstance(error, Unwritable):
        return error
    number = disk_problem(error)
    if number is None:
        return None
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "filename", None) is None:
        cause = cause.__cause__ or cause.__context__
    return Unwritable(getattr(cause, "filename", place), os.strerror(number), ADVICE[number])


def below(root: Path, *names: str) -> Path:
    """The path of ``names`` in a directory: the way from a name that came from elsewhere to a file.

    Raises ValueError where that leaves the directory, or is the directory itself: ``..``, an absolute name, a
    separator, a null byte.
    """
    for name in names:
        if name in ("", ".", "..") or any(sign in name for sign in ("/", "\\", "\0")):
            raise ValueError(
                f"{name[:80]!r} is no name of a file in {root}: it has a separator, or leaves the directory"
            )
    if not names:
        raise ValueError(f"no name of a file in {root}")
    return root.joinpath(*names)


def fsync_directory(path: Path) -> None:
    """Make new names in the folder ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # Several processes or threads may write the same file at once.
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")


def _bytes(content: str | bytes) -> bytes:
    return content.encode("utf-8") if isinstance(content, str) else content
