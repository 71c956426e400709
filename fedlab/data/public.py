"""Public texts, which the server may look at: nobody's private data, no labels, no clients.

``lora.public`` for adapters and strategies, ``evaluate.drift`` for what a model forgets, ``evaluate.prompts`` for
answers that a report may show.
"""

from __future__ import annotations

from pathlib import Path

from fedlab.config import RunConfig
from fedlab.config.sections import EvaluateSection, LoraSection
from fedlab.data.rows import is_number
from fedlab.data.sources import SOURCES
from fedlab.data.table import shown
from fedlab.data.tables import READERS, files_at, read_columns
from fedlab.errors import ConfigError

PROMPTS = 64  # most that a report shows


def public_texts(lora: LoraSection) -> list[str]:
    """At most ``lora.public_texts`` texts of ``lora.public``, spread evenly over it. Raises ConfigError."""
    assert lora.public is not None
    return _evenly(texts_at("lora.public", lora.public), lora.public_texts)


def drift_texts(evaluate: EvaluateSection) -> list[str]:
    """At most ``evaluate.drift_texts`` texts of ``evaluate.drift``, spread evenly over it. Raises ConfigError."""
    assert evaluate.drift is not None
    return _evenly(texts_at("evaluate.drift", evaluate.drift), evaluate.drift_texts)


def prompts(evaluate: EvaluateSection) -> list[str]:
    """Every prompt of ``evaluate.prompts``. Raises ConfigError for more than a report shows."""
    assert evaluate.prompts is not None
    found = texts_at("evaluate.prompts", evaluate.prompts, "prompt")
    if len(found) > PROMPTS:
        raise ConfigError(
            f"evaluate.prompts = {evaluate.prompts!r} holds {len(found)} prompts, and a report shows at most {PROMPTS};"
            " give fewer"
        )
    return found


def texts_at(key: str, path: str, *columns: str) -> list[str]:
    """The texts of a file, in its order; empty ones are skipped.

    csv, tsv, json, jsonl and parquet files, or a directory of them, are read as tables: one of ``columns``, the column
    ``text``, or the only one that holds strings. Any other file has one text per line.

    Args:
        key: of the configuration, for errors.
        path: a file or a directory.
        columns: names of the column, the preferred one first.

    Raises:
        ConfigError: there is no such file, column or text.
    """
    found = files_at(path)
    if not found:
        raise ConfigError(f"{key} = {path!r}: no such file, or a directory without {', '.join(READERS)} files")
    if found[0].suffix in READERS:
        texts = _column(key, path, *columns, "text")
    else:
        try:
            texts = found[0].read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key} = {path!r} cannot be read as UTF-8 text: {error}") from None
    texts = [stripped for text in texts if (stripped := text.strip())]
    if not texts:
        raise ConfigError(f"{key} = {path!r} holds no text")
    return texts


def check_public(config: RunConfig) -> None:
    """Raise ConfigError if a file of public texts is given and cannot be read, or is the clients' own text."""
    evaluate = config.evaluate
    given = {"lora.public": config.lora.public, "evaluate.drift": evaluate.drift, "evaluate.prompts": evaluate.prompts}
    for key, path in given.items():
        if path is not None:
            _check_apart(config, key, path)
    if config.lora.public is not None:
        public_texts(config.lora)
    if evaluate.drift is not None:
        drift_texts(evaluate)
    if evaluate.prompts is not None:
        prompts(evaluate)


def _check_apart(config: RunConfig, key: str, path: str) -> None:
    sections = [config.data.model_dump() | dict(task.data) for task in config.tasks] or [config.data.model_dump()]
    paths = [
        section[name] for section in sections if SOURCES[section["source"]].local for name in ("path", "test_path")
    ]
    own = [Path(place).expanduser().resolve() for place in paths if place]
    public = Path(path).expanduser().resolve()
    if any(public == place or public in place.parents or place in public.parents for place in own):
        raise ConfigError(
            f"{key} = {path!r} holds, or lies in, the data of the clients: a release of it that no noise protects; give"
            " public text from elsewhere"
        )


def _evenly(texts: list[str], most: int) -> list[str]:
    count = min(len(texts), most)
    return [texts[i * len(texts) // count] for i in range(count)]


def _column(key: str, path: str, *names: str) -> list[str]:
    columns = read_columns(path)
    strings = [name for name, values in columns.items() if not all(not v or is_number(v) for v in values)]
    only = strings[0] if len(strings) == 1 else None
    name = next((name for name in names if name in strings), only)
    if name is None:
        wanted = " or ".join(f'"{name}"' for name in names)
        raise ConfigError(
            f"{key} = {path!r}: want a column {wanted}, or one column of strings; it has {shown(list(columns))}"
        )
    return [v for v in columns[name] if v is not None]
