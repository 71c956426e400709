"""What is left of a configuration whose file is wrong: the keys that are right, so that they can be looked at too."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from typing import Any, cast

import pydantic

from fedlab.config.load import apply_override
from fedlab.config.run import RunConfig
from fedlab.errors import ConfigError

LEAST: dict[str, dict[str, Any]] = {  # what a section needs at least, to stand in for one that is wrong
    "run": {"rounds": 1},
    "lora": {"rank": 1, "alpha": 1},
    "train": {"steps": 1, "lr": 1},
}


def partial(text: str, overrides: Sequence[str]) -> tuple[RunConfig, frozenset[str]] | None:
    """The configuration without its wrong keys, and which these are: ``section.key``, or a section that is wrong whole.

    A misspelt key counts as wrong under the name that was meant, too. None where the text is no TOML, or an override
    cannot be read: then nothing can be said of the rest. What must hold between sections is not asked for.
    """
    try:
        tree = tomllib.loads(text)
        for override in overrides:
            apply_override(tree, override)
    except (tomllib.TOMLDecodeError, ConfigError):
        return None
    sections: dict[str, Any] = {}
    broken: set[str] = set()
    for name, field in RunConfig.model_fields.items():
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(cast(Any, field.annotation))
        default = LEAST[name] if field.is_required() else field.default
        given = tree.get(name, default)
        if name not in tree and field.is_required():
            broken.add(name)
        try:
            sections[name] = adapter.validate_python(given)
            continue
        except pydantic.ValidationError as error:
            keys = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
        rest = {key: value for key, value in given.items() if key not in keys} if isinstance(given, dict) else default
        try:
            assert keys, "the section as a whole is wrong"
            sections[name] = adapter.validate_python({**(LEAST.get(name) or {}), **rest})
            near = {key: difflib.get_close_matches(key, list(field_names(field)), 1, 0.5) for key in keys}
            broken |= {f"{name}.{one}" for key, others in near.items() for one in (key, *others)}
        except (pydantic.ValidationError, AssertionError, TypeError):
            broken.add(name)
            sections[name] = adapter.validate_python(default)
    return RunConfig.model_construct(**sections), frozenset(broken)


def field_names(field: Any) -> list[str]:
    """The keys of the table that a field holds; none for what is no single table."""
    return list(getattr(field.annotation, "model_fields", ()))
