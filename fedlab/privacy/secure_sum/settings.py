"""Which secure sums a configuration asks for, and of how many clients: the server proposes, clients check."""

from __future__ import annotations

from typing import Literal, cast

from fedlab.config import RunConfig
from fedlab.config.privacy import quorum
from fedlab.errors import SumRefused

Purpose = Literal["round", "gram"]


def purposes(config: RunConfig) -> tuple[Purpose, ...]:
    """What is added up: the shares of a round under shared noise, or at a task's end what inputs it used."""
    if config.shared_noise:
        return ("round",)
    masked = config.gram is not None and not config.private and not config.gram.clear
    return ("gram",) if masked else ()


def is_masked(config: RunConfig, deployed: bool) -> bool:
    """Whether clients mask what is added up: a simulation may leave the masks of a round out, since they cancel."""
    asked = purposes(config)
    return "gram" in asked or ("round" in asked and (config.privacy.masked or deployed))


def bounds(config: RunConfig, purpose: Purpose, count: int) -> tuple[int, int]:
    """Fewest clients in a sum of so many participants, and how many of them may collude with the server.

    Raises SumRefused where the configuration asks for no such sum.
    """
    if purpose not in purposes(config):
        raise SumRefused(f"this configuration has no secure sum of {purpose}s; set privacy.survivors, or strategy.gram")
    if purpose == "round":
        assert config.privacy.survivors is not None
        return config.privacy.survivors, config.privacy.colluding
    assert config.gram is not None
    return max(config.gram.min_clients, quorum(count, 0)), 0


def name_of(purpose: Purpose, number: int, attempt: int) -> str:
    """The name of a sum: its purpose, the round's number (0 at a task's end), and how often it was prepared anew."""
    return f"{purpose}-{number}-{attempt}"


def subject_of(name: str) -> tuple[Purpose, int]:
    """Purpose and number in a sum's name: of them, a client masks one attempt at most."""
    purpose, number, _ = name.split("-")
    return cast(Purpose, purpose), int(number)
