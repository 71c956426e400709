"""TOML in and out: ``--set`` overrides, and errors that name the key, its value and the nearest known one."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic

from fedlab.errors import ConfigError

M = TypeVar("M", bound=pydantic.BaseModel)
RENAMED = {  # what a key was called before → its name now
    "run.cache_prefix": "run.cache_hidden_states",
    "model.task": "objective.name",
    "strategy.gram.cohort": "strategy.gram.min_clients",
}


def without_none(value: Any) -> Any:
    """The value without dictionary entries that are None: TOML has no null."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_none(v) for v in value]
    return value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value``; the value is read as TOML; a bare word, path or address as a string."""
    key, equals, raw = override.partition("=")
    path = key.strip().split(".")
    section = len(path) == 1 and raw.strip().startswith("{")  # privacy={unit="none"} replaces the whole section
    if not equals or not all(path) or not (section or len(path) > 1):
        raise ConfigError(f"--set {override!r}: write section.key=value, for example --set train.lr=0.5")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        if not re.fullmatch(r"[\w./:~@+-]*\w[\w./:~@+-]*", raw.strip()):
            raise ConfigError(f"--set {override!r}: {raw.strip()!r} is not a TOML value") from None
        value = raw.strip()
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is not a section")
    tree[path[-1]] = value


def parse_model(model: type[M], text: str, overrides: Sequence[str], origin: str) -> M:
    """TOML text with overrides as one validated model.

    Raises ConfigError with a line for everything that is wrong: the key, its value and, for unknown keys, the nearest.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin} is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tree, override)
    problems = [f"{old} is now called {new}" for old, new in RENAMED.items() if _holds(tree, old)]
    if not problems:
        try:
            return model.model_validate(tree)
        except pydantic.ValidationError as error:
            problems = [line for detail in error.errors() for line in _sentence(model, detail).splitlines()]
    raise ConfigError("\n".join(problems)) from None


def schema(model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """JSON schema of a configuration file, with each key's description: what editors complete and check TOML with."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}


def read_text(path: str | Path) -> str:
    """A configuration file's text. Raises ConfigError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except IsADirectoryError:
        run = Path(path) / "run.toml"
        more = f": a run directory; give {run}, or continue it with fedlab resume {path}" if run.is_file() else ""
        raise ConfigError(f"cannot read configuration {str(path)!r}: it is a directory{more}") from None
    except OSError as error:
        raise ConfigError(f"cannot read configuration {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read configuration {str(path)!r}: it is not UTF-8 ({error.reason})") from None


def _fields_at(root: type[pydantic.BaseModel], location: tuple[int | str, ...]) -> list[str]:
    model: Any = root
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _holds(tree: Any, key: str) -> bool:
    """Whether a tree of tables has this dotted key."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _sentence(model: type[pydantic.BaseModel], detail: Any) -> str:
    location, key = tuple(detail["loc"]), ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return unknown_key(key, str(location[-1]), _fields_at(model, location[:-1]))
    if detail["type"] == "missing":
        return f"{key} is missing: {detail['msg'].lower()}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    shown = "" if isinstance(detail["input"], dict | pydantic.BaseModel) else f", got {detail['input']!r}"
    return f"{key + ': ' if key else ''}{message}{shown}"


def unknown_key(key: str, name: str, known: list[str]) -> str:
    """Sentence for a key that does not exist, naming the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {key[: len(key) - len(name)]}{near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key {key}; {hint}"
