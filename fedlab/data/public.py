"""Public texts, which the server may look at: ``lora.public``. Nobody's private data, no labels, no clients."""

from __future__ import annotations

from pathlib import Path

from fedlab.config import RunConfig
from fedlab.config.sections import LoraSection
from fedlab.data.rows import is_number
from fedlab.data.sources import SOURCES
from fedlab.data.table import shown
from fedlab.data.tables import READERS, files_at, read_columns
from fedlab.errors import ConfigError


def public_texts(lora: LoraSection) -> list[str]:
    """At most ``lora.public_texts`` texts of ``lora.public``, spread evenly over it, in its order; empty ones are
    skipped.

    csv, tsv, json, jsonl and parquet files, or a directory of them, are read as tables: the column ``text``, or the
    only one that holds strings. Any other file has one text per line. Raises ConfigError if there is no such file,
    column or text.
    """
    assert lora.public is not None
    found = files_at(lora.public)
    if not found:
        raise ConfigError(
            f"lora.public = {lora.public!r}: no such file, or a directory without {', '.join(READERS)} files"
        )
    if found[0].suffix in READERS:
        texts = _column(lora.public)
    else:
        try:
            texts = found[0].read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"lora.public = {lora.public!r} cannot be read as UTF-8 text: {error}") from None
    texts = [stripped for text in texts if (stripped := text.strip())]
    if not texts:
        raise ConfigError(f"lora.public = {lora.public!r} holds no text")
    count = min(len(texts), lora.public_texts)
    return [texts[i * len(texts) // count] for i in range(count)]


def check_public(config: RunConfig) -> None:
    """Raise ConfigError if ``lora.public`` is given and cannot be read, or is the clients' own text."""
    if config.lora.public is None:
        return
    sections = [config.data.model_dump() | dict(task.data) for task in config.tasks] or [config.data.model_dump()]
    paths = [section[key] for section in sections if SOURCES[section["source"]].local for key in ("path", "test_path")]
    own = [Path(path).expanduser().resolve() for path in paths if path]
    public = Path(config.lora.public).expanduser().resolve()
    if any(public == path or public in path.parents or path in public.parents for path in own):
        raise ConfigError(
            f"lora.public = {config.lora.public!r} holds, or lies in, the data of the clients: a release of it that no"
            " noise protects; give public text from elsewhere"
        )
    public_texts(config.lora)


def _column(path: str) -> list[str]:
    columns = read_columns(path)
    strings = [name for name, values in columns.items() if not all(not v or is_number(v) for v in values)]
    name = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if name is None:
        raise ConfigError(
            f'lora.public = {path!r}: want a column "text", or one column of strings; it has {shown(list(columns))}'
        )
    return [v for v in columns[name] if v is not None]
