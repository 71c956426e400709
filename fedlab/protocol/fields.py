"""Types of the fields of messages, and what several messages have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints

from fedlab.identifiers import PATTERN, is_identifier
from fedlab.protocol.failures import FailureCode

MOST_CONFIGURATION, MOST_LINES = 2**20, 2**26  # characters


def _identifier(text: str) -> str:
    """It becomes a file's name: reserved ones are none."""
    if not is_identifier(text):
        raise ValueError("is no identifier of a client (fedlab.identifiers)")
    return text


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    """Whoever asks for something twice is no honest server."""
    if len(set(names)) < len(names):
        raise ValueError("names something twice")
    return names


ClientId = Annotated[str, StringConstraints(pattern=PATTERN), AfterValidator(_identifier)]
RunId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
NoDigest = Literal[""]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
Share = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]  # of a secret, in hex
Sealed = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{96}$")]  # two shares, encrypted and authenticated
SumName = Annotated[str, StringConstraints(pattern=r"^(round|gram)-[0-9]{1,9}-[0-9]$")]  # what, number, attempt
Names = Annotated[tuple[Name, ...], AfterValidator(_once)]
Lines = Annotated[str, StringConstraints(max_length=MOST_LINES)]
Part = Annotated[str, StringConstraints(pattern=r"^(lora_A|lora_B|head)$")]
WireType = Literal["float32", "bfloat16"]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict:
    """Base of the messages: unknown fields are refused."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class RunReference(Strict):
    """Which run a request belongs to."""

    run: RunId
    configuration: Digest  # SHA-256 of the resolved TOML
    parts: tuple[Part, ...]  # the most that clients are ever asked to train: what a privacy plan's scope covers
    basis: Digest | NoDigest = ""  # of what stays as it is during this task of a stream; "" if nothing does


@dataclass(frozen=True)
class Failure(Strict):
    """Why a client gives nothing. ``refused``: it will not take part in this run any more."""

    code: FailureCode
    refused: bool = False
