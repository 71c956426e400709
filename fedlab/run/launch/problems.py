"""Errors that are collected, to be told all at once: whoever corrects a configuration wants to do it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fedlab.errors import ConfigError, FedlabError, PrivacyError

T = TypeVar("T")


class Problems:
    """What was found to be wrong so far."""

    def __init__(self) -> None:
        self.found: list[FedlabError] = []

    def of(self, action: Callable[[], T], lines: bool = False) -> T | None:
        """The action's value; None where it raised, which is noted. ``lines``: each line of its error is one."""
        try:
            return action()
        except FedlabError as error:
            self.add(error, lines)
            return None

    def fine(self, action: Callable[[], object]) -> bool:
        """Whether the action raised nothing; what it raised is noted."""
        before = len(self.found)
        self.of(action)
        return len(self.found) == before

    def add(self, error: FedlabError, lines: bool = False) -> None:
        """Note an error, or each of those that it lists, once."""
        listed: tuple[FedlabError, ...] = error.problems or (error,)
        if lines:
            listed = tuple(ConfigError(line) for one in listed for line in str(one).splitlines())
        told = {str(one) for one in self.found}
        self.found += [one for one in listed if str(one) not in told]

    def raise_all(self) -> None:
        """Raise what was found: the error itself if there is one, else one that lists all in the order they came."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise self.found[0]
        kind = PrivacyError if all(isinstance(one, PrivacyError) for one in self.found) else ConfigError
        lines = [f"- {one}" for one in self.found]
        error: FedlabError = kind("\n".join([f"{len(lines)} problems; nothing was started", *lines]))
        error.problems = tuple(self.found)
        raise error
