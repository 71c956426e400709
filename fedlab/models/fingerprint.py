"""One hash for a base model: of the files that decide what it computes, wherever a copy of them lies."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

from fedlab.config.sections import ModelSection
from fedlab.errors import ConfigError
from fedlab.models.hub import locate

SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model", ".gguf", ".jinja", ".tiktoken")
CHUNK = 2**20


class ModelMismatch(ConfigError):
    """A copy of a base model is another one than was named."""

    code = "model"


def model_fingerprint(model: ModelSection) -> str:
    """SHA-256 over names and contents of a model's files on this machine: weights, configuration, tokenizer.

    Raises ConfigError if there is no copy here whose files can be read.
    """
    directory = Path(locate(model))
    if not directory.is_dir():
        directory = _cached(model)
    files = sorted(
        path for path in directory.rglob("*") if path.suffix in SUFFIXES and path.is_file() and ".git" not in path.parts
    )
    if not files:
        raise ConfigError(f"model.name = {model.name!r}: {str(directory)!r} has no files of a model")
    stamps = tuple((str(path.relative_to(directory)), *_stamp(path)) for path in files)
    return _hashed(str(directory), stamps)


def check_fingerprint(found: str, allowed: Collection[str], key: str) -> None:
    """Raise ModelMismatch if a copy's hash is none of those that ``key`` names."""
    if found not in allowed:
        raise ModelMismatch(
            f"{key} names {', '.join(name[:16] + '…' for name in allowed)}, but the files of the copy here hash to"
            f" {found}: another model, revision or format; get the same one, or name this hash if it is meant"
        )


def _cached(model: ModelSection) -> Path:
    """Where the hub's cache has a model. Raises ConfigError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.name, revision=model.revision, local_files_only=True))
    except Exception as error:
        raise ConfigError(
            f"model.name = {model.name!r} has no copy on this machine to hash ({type(error).__name__}); download it"
            " first"
        ) from None


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=8)
def _hashed(directory: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """The hash of these files; computed once per process while they stay as they are."""
    whole = hashlib.sha256()
    for name, _, _ in stamps:
        one = hashlib.sha256()
        with (Path(directory) / name).open("rb") as file:
            while chunk := file.read(CHUNK):
                one.update(chunk)
        whole.update(f"{name} {one.hexdigest()}\n".encode())
    return whole.hexdigest()
