"""[data] and [clients]: the text, who holds what of it, and what differs between those who hold it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from fedlab.config.base import Section

DEFAULT_CLIENTS = 6  # where neither data.clients nor the data say how many


class Partition(Section):
    """[data.partition]: how examples are assigned to clients (flwr-datasets partitioners)."""

    kind: Literal["iid", "dirichlet", "natural", "shard", "pathological", "linear", "square", "exponential"] = Field(
        default="iid",
        description=(
            "how examples are assigned to clients: evenly at random (iid), by label with Dirichlet shares, by a column"
            " that names the client (natural), in shards sorted by label, a fixed number of classes each"
            " (pathological), or at random in sizes that grow linearly, by squares, or exponentially"
        ),
    )
    alpha: float | None = Field(
        default=None, gt=0, description="dirichlet: concentration of each label's shares; smaller is more skewed"
    )
    column: str | None = Field(
        default=None, description="natural: the column that names each example's client, as it is written there"
    )
    classes_per_client: int | None = Field(
        default=None, gt=0, description="pathological: classes that one client has examples of"
    )
    shards_per_client: int | None = Field(
        default=None, gt=0, description="shard: pieces of the corpus, sorted by label, that one client gets"
    )

    @model_validator(mode="after")
    def _needed(self) -> Partition:
        needed = {
            "dirichlet": "alpha",
            "natural": "column",
            "pathological": "classes_per_client",
            "shard": "shards_per_client",
        }
        for kind, key in needed.items():
            given = getattr(self, key) is not None
            if kind == self.kind and not given:
                raise ValueError(f'kind = "{self.kind}" needs {key}')
            if kind != self.kind and given:
                raise ValueError(f'{key} belongs to kind = "{kind}", but kind = "{self.kind}"; remove one of them')
        return self


class Canaries(Section):
    """[data.canaries]: made-up secrets among the training records, to see whether a model learns them by heart."""

    count: int = Field(default=4, gt=0, description="different secrets, dealt to the clients in turn")
    records: int = Field(default=1, gt=0, description="records of its client that hold the same secret")
    space: int = Field(
        default=1000,
        gt=1,
        le=1_000_000,
        description="random sequences that the secrets are chosen from: a rank among them at best 1",
    )

    @model_validator(mode="after")
    def _room(self) -> Canaries:
        if self.space < 2 * self.count:
            raise ValueError(f"space = {self.space} leaves too few sequences that are no secret; at least 2 · count")
        return self


class DataSection(Section):
    """[data]: the text, its labels, and who holds what."""

    source: Literal["docstrings", "wordnet", "code", "definitions", "files", "hub"] = Field(
        default="docstrings",
        description=(
            "where text and labels come from: docstrings of installed libraries, WordNet's glosses; for objectives that"
            " generate, code and its docstring (code), words and their glosses (definitions); local files (csv, tsv,"
            " json, jsonl, parquet, arrow), or a data set of the Hugging Face hub"
        ),
    )
    clients: int | None = Field(
        default=None,
        gt=0,
        description=(
            f"number of clients; default: {DEFAULT_CLIENTS}, or under partition.kind = natural as many as the column"
            " names"
        ),
    )
    partition: Partition = Field(default=Partition(), description="how examples are assigned to clients")
    min_client_size: int = Field(
        default=10, gt=1, description="fewest training examples of a client; with fewer the run is refused"
    )
    max_length: int = Field(default=64, gt=1, description="tokens of a text; longer texts are cut")
    test_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="share of each client's examples that is held out, never trained on"
    )
    canaries: Canaries | None = Field(
        default=None,
        description=(
            "simulations: put made-up secrets among the clients' training records, beside their own, and measure how"
            " exposed they are in the end; default: none"
        ),
    )
    limit: int | None = Field(
        default=None, gt=0, description="use at most this many training examples, a seeded choice; default: all"
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        description="of who holds what and what is held out; default: run.seed. Runs that share a ledger need one deal",
    )
    on_bad_row: Literal["refuse", "drop"] = Field(
        default="refuse",
        description=(
            "files, hub: what becomes of rows without a label, a text or an owner (nothing, null, NaN): the run is"
            " refused with their lines, or they are left out and counted in data.json"
        ),
    )
    duplicates: Literal["keep", "purge"] = Field(
        default="keep",
        description="held-out texts that are also trained on: keep (and say how many), or purge from what is scored",
    )
    path: str | None = Field(
        default=None,
        description="files: a file or directory; wordnet: its directory; hub: the data set's id",
    )
    test_path: str | None = Field(
        default=None,
        description="files: a file or directory with the official test split; default: the clients' held-out examples",
    )
    subset: str | None = Field(
        default=None,
        description='hub: configuration, e.g. "sst2"; wordnet: "noun" (default), "verb", "adj", "adv" or "all"',
    )
    split: str = Field(default="train", description="hub: the split that is assigned to clients")
    test_split: str | None = Field(
        default=None, description='hub: the split that is the official test split; default: "validation", if there'
    )
    revision: str | None = Field(default=None, description="hub: commit, tag or branch of the data set")
    text: str | tuple[str, ...] | None = Field(
        default=None, description="files, hub: the text column, or two for sentence pairs; default: known for GLUE sets"
    )
    label: str | None = Field(
        default=None,
        description='files, hub: the column of labels, or of answers; default for the hub: "label"; none for causal-lm',
    )
    context: str | None = Field(
        default=None,
        description=(
            "files, hub: a column that follows the prompt after an empty line, where it is not empty (Alpaca's"
            ' "input"); for objective instruction'
        ),
    )
    messages: str | None = Field(
        default=None,
        description=(
            'files, hub: the column of whole conversations, lists of messages with "role" and "content", in place of'
            " text and label; for objective instruction"
        ),
    )

    @model_validator(mode="after")
    def _one_form(self) -> DataSection:
        if self.messages is not None and any(key is not None for key in (self.text, self.label, self.context)):
            raise ValueError("messages takes the place of text, context and label; remove those, or messages")
        if self.context is not None and isinstance(self.text, tuple):
            raise ValueError("context goes with one text column, not with a pair")
        return self


class ClientsSection(Section):
    """[clients]: what differs between clients, by name ({"client-3" = 4}) or by share of the clients ({"50%" = 4})."""

    rank: dict[str, int] = Field(
        default={}, description="rank of a client's adapter, by client or share; 1 to lora.rank, which the others have"
    )
    lr: dict[str, float] = Field(
        default={},
        description="factor on train.lr and train.head_lr, by client or share; above 0; the others have 1",
    )

    @model_validator(mode="after")
    def _one_way(self) -> ClientsSection:
        for name, own in (("rank", self.rank), ("lr", self.lr)):
            shares = [key for key in own if key.endswith("%")]
            for key in shares:
                if not percent(key):
                    raise ValueError(f'{name}: {key!r} is no share of the clients; write, for example, "50%"')
            if shares and len(shares) < len(own):
                raise ValueError(f"{name}: name clients or shares, not both: {', '.join(own)}")
            if (total := sum(percent(key) for key in shares)) > 100:
                raise ValueError(f"{name}: the shares add up to {total:g} %, more than all clients")
        for key, rank in self.rank.items():
            if rank < 1:
                raise ValueError(f"rank: {key} must have a rank >= 1, got {rank}")
        for key, factor in self.lr.items():
            if not (factor > 0 and math.isfinite(factor)):
                raise ValueError(f"lr: {key} must have a positive factor, got {factor}")
        return self


def percent(share: str) -> float:
    """Number of a share: 50.0 of "50%"; 0 for what is none in (0, 100]."""
    try:
        value = float(share.removesuffix("%"))
    except ValueError:
        return 0.0
    return value if 0 < value <= 100 else 0.0
