"""What a key means: its description, range and default, read from its field. For ``fedlab explain`` and the docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from fedlab.config.load import unknown_key
from fedlab.errors import ConfigError

BOUNDS = {"Gt": ">", "Ge": "≥", "Lt": "<", "Le": "≤"}


@dataclass(frozen=True)
class Key:
    """One key of a configuration file."""

    name: str  # dotted, e.g. "train.lr"
    meaning: str
    range: str  # what may stand there, e.g. "number > 0"
    default: str  # as TOML would have it; "required", or "–" where leaving it out means something of its own

    def __str__(self) -> str:
        return f"{self.name}: {self.meaning}\n  range:   {self.range}\n  default: {self.default}"


def keys(model: type[pydantic.BaseModel], before: str = "") -> Iterator[Key]:
    """Every key of a section and of the sections in it, tables themselves left out, in the order of the fields."""
    for name, field in model.model_fields.items():
        if (inner := section_of(field.annotation)) is not None:
            yield from keys(inner, f"{before}{name}.")
        else:
            yield Key(f"{before}{name}", field.description or "", _range(field), _default(field))


def explain(
    model: type[pydantic.BaseModel], key: str, options: Mapping[str, type[pydantic.BaseModel]] | None = None
) -> str:
    """What a key or a whole table means, as text.

    Args:
        key: dotted, e.g. ``"train.lr"`` or ``"train"``; ``""`` for all keys.
        options: strategy name → the keys that it has below [strategy].

    Raises:
        ConfigError: there is no such key; it names the nearest.
    """
    owners: dict[Key, list[str]] = {}
    for strategy, own in (options or {}).items():
        for one in keys(own, "strategy."):
            owners.setdefault(one, []).append(strategy)
    theirs = [replace(one, meaning=f"{one.meaning} (of {', '.join(names)})") for one, names in owners.items()]
    found = [*keys(model), *theirs]
    chosen = [one for one in found if one.name == key or one.name.startswith(f"{key}.") or not key]
    if not chosen:
        raise ConfigError(unknown_key(key, key, sorted({one.name for one in found})))
    return "\n\n".join(map(str, chosen))


def section_of(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The table that a field holds, alone, as an alternative to nothing, or in a list; None for a value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, pydantic.BaseModel):
            return candidate
    return None


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{BOUNDS[kind]} {getattr(m, kind.lower()):g}" for m in field.metadata if (kind := type(m).__name__) in BOUNDS
    ]
    return " ".join([_type(field.annotation), " and ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"table of {_type(arguments[1])}"
    if arguments:  # alternatives
        return " | ".join(_type(one) for one in arguments if one is not type(None))
    names = {int: "whole number", float: "number", str: "text", bool: "true | false", Any: "any value"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return f'"{value}"' if isinstance(value, str) else str(value)
