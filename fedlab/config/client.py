"""What a client's owner writes down itself: the policy under which its data may be used at all.

A policy is a TOML file on the client's own machine. Nothing in it comes from a server, and a deployed client without
one takes part in nothing. What it says is held against every request before data are opened (``clients.policy``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fedlab.config.base import Section
from fedlab.config.data import DataSection
from fedlab.config.load import parse_model, read_text

PartName = Literal["lora_A", "lora_B", "head"]
ReleaseName = Literal["size", "timing", "failure", "update", "training-metrics", "scores", "gram"]
ALWAYS: tuple[ReleaseName, ...] = ("size", "timing", "failure")  # no run works without them


class DataPolicy(Section):
    """[data]: the one place whose records may be used, as ``[data]`` of a run names it. What is left out must be left
    out there too.
    """

    source: str = Field(default="files", description="kind of the source (data.source of a run)")
    path: str | None = Field(default=None, description="file, directory or data set; compared as a resolved path")
    test_path: str | None = Field(default=None, description="file or directory of the official test split")
    subset: str | None = Field(default=None, description="hub: configuration; wordnet: part of speech")
    split: str = Field(default="train", description="hub: the split that is trained on")
    test_split: str | None = Field(default=None, description="hub: the split of the official test split")
    revision: str | None = Field(default=None, description="hub: commit, tag or branch")
    text: str | tuple[str, ...] | None = Field(default=None, description="text column, or two")
    label: str | None = Field(default=None, description="label column")
    context: str | None = Field(default=None, description="column that follows the prompt")
    messages: str | None = Field(default=None, description="column of whole conversations")
    seed: int | None = Field(default=None, description="of which records are held out (data.seed)")
    on_bad_row: str = Field(default="refuse", description='rows that lack something: "refuse" or "drop"')
    duplicates: str = Field(default="keep", description='held-out texts that are trained on: "keep" or "purge"')
    column: str | None = Field(default=None, description="column that may be read to tell whose a record is")

    @model_validator(mode="after")
    def _readable(self) -> DataPolicy:
        self.section()
        return self

    def section(self) -> DataSection:
        """The ``[data]`` that reads this place."""
        return DataSection.model_validate(self.model_dump(exclude={"column"}))


class ClientPolicy(Section):
    """[policy]: what a client takes part in. Everything else it refuses."""

    unit: Literal["example", "client", "none"] = Field(
        default="example", description="what a run must protect (privacy.unit), exactly"
    )
    noise: Literal["secure"] = Field(
        default="secure", description="where noise must come from: seeded noise can be subtracted by who knows the seed"
    )
    min_sigma: float | None = Field(default=None, gt=0, description="least noise multiplier of a run")
    max_epsilon: float | None = Field(default=None, gt=0, description="most ε that one run may spend")
    max_delta: float = Field(default=1e-5, gt=0, lt=1, description="greatest δ of a run's ε, and of the budget's")
    max_clip: float | None = Field(default=None, gt=0, description="greatest clipping norm; default: any")
    min_batch: int = Field(
        default=8, gt=0, description="fewest expected examples per step; of a batch of one, a gradient shows the label"
    )
    trained: tuple[PartName, ...] = Field(
        default=("lora_A", "lora_B", "head"), description="parts of a model that may be trained on the data"
    )
    releases: tuple[ReleaseName, ...] = Field(
        default=ALWAYS, description="what may leave without noise; training-metrics, scores and update only if named"
    )
    models: tuple[str, ...] = Field(min_length=1, description="base models (model.name) that may be run on the data")
    data: DataPolicy = Field(description="the records that may be used")

    @model_validator(mode="after")
    def _says_enough(self) -> ClientPolicy:
        if self.unit == "example" and self.min_sigma is None and self.max_epsilon is None:
            raise ValueError('unit = "example" needs a limit: give max_epsilon, min_sigma, or both')
        if self.unit != "example" and "update" not in self.releases:
            raise ValueError(
                f'unit = "{self.unit}" sends updates to the server as they are; if that is meant, name "update" in'
                " releases"
            )
        if missing := [name for name in ALWAYS if name not in self.releases]:
            raise ValueError(f"releases: {', '.join(missing)} is missing, and no run works without")
        return self

    @classmethod
    def load(cls, path: str | Path) -> ClientPolicy:
        """Read a policy from its file. Raises ConfigError."""
        return parse_model(cls, read_text(path), (), str(path))
