"""The table of families in docs/models.md is what runs do: each row is made anew and compared (slow).

``FEDLAB_WRITE_DOCS=1 pytest -m slow tests/models/test_docs_table.py`` writes the rows instead.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import families
import generative
import numpy as np
import peft
import pytest
import torch

import fedlab
from fedlab.config import RunConfig
from fedlab.errors import ConfigError, NotPerExample
from fedlab.session import open_session

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
COLUMNS = ("family", "objective", '`"auto"` adapts', "works", '`"all-linear"` adapts', "works")
ROWS = [(family, "classification") for family in families.FAMILIES]
ROWS += [(family, generative.objective_of(family)) for family in generative.GENERATIVE]


def line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def kept() -> dict[tuple[str, str], str]:
    """(family, objective) → its line in the docs."""
    found = {}
    for text in DOCS.read_text(encoding="utf-8").splitlines():
        if len(cells := [cell.strip() for cell in text.strip("|").split("|")]) == len(COLUMNS) and cells[0] != "family":
            found[cells[0], cells[1].strip("`")] = text
    return {key: text for key, text in found.items() if not key[0].startswith("---")}


@pytest.fixture
def made(
    tiny_toml: str, tiny_bert: Path, tokenizer_files: Path, tmp_path: Path
) -> Callable[[str, str, str, str], RunConfig]:
    """A function: family, objective, target modules, unit of privacy → a configuration of one round."""

    @cache
    def files(family: str, objective: str) -> Path:
        save = families.save_family if objective == "classification" else generative.save_generative
        path: Path = save(family, tokenizer_files, tmp_path / family)
        return path

    def config(family: str, objective: str, targets: str, unit: str) -> RunConfig:
        text = tiny_toml.replace(str(tiny_bert), str(files(family, objective)))
        text += f'[objective]\nname = "{objective}"\n'
        settings = ["run.rounds=1", "strategy.name=fedavg", f"lora.target_modules={targets}"]
        settings += ["evaluate.evaluators=['language']"] if objective != "classification" else []
        return RunConfig.parse(text, settings + (["privacy={unit='none'}"] if unit == "none" else []))

    return config


def reason(error: Exception) -> str:
    """The part of a refusal that says why, without places and shapes."""
    text = str(error).splitlines()[0]
    text = re.sub(r"^privacy\.unit = \"example\" with model\.name = '[^']*' \([^)]*\): ", "", text)
    text = text.partition(". The clip would not hold")[0].partition("; ")[0]
    text = re.sub(r'^train\.gradients = "\w+" cannot be had of this model \(([^:]*).*', r"\1", text)
    text = re.sub(r"(model\.name|lora|lora\.target_modules|train\.head)(: | = \"auto\" )", "", text)
    return re.sub(r" \([^()]*is fed [^()]*\)|, which losses by chunks would miss", "", text)


def outcome(
    made: Callable[[str, str, str, str], RunConfig], family: str, objective: str, targets: str, out: Path
) -> str:
    """ "yes"; "without DP: why"; or "no: why"."""
    try:
        checked(fedlab.simulate(made(family, objective, targets, "example"), out / "private", quiet=True), objective)
    except NotPerExample as error:
        run = fedlab.simulate(made(family, objective, targets, "none"), out / "plain", quiet=True)
        checked(run, objective, exact=family != "xlnet")
        return f"without DP: {reason(error)}"
    except ConfigError as error:
        return f"no: {reason(error)}"
    return "yes"


def checked(run: fedlab.Run, objective: str, exact: bool = True) -> None:
    """Fails unless a run completed and its adapter has its scores in plain peft."""
    assert run.result["status"] == "completed"
    assert run.result["excluded"] == 0
    if exact:  # XLNet reads padding, so that its scores depend on the batch
        assert plain_loss(run, objective) == pytest.approx(run.result["scores"]["loss"], rel=1e-4, abs=1e-5)


def plain_loss(run: fedlab.Run, objective: str) -> float:
    """Loss of the run's test texts, one by one, by what AutoPeft makes of the adapter directory."""
    told = json.loads((run.path / "adapter" / "labels.json").read_text())
    session = open_session(RunConfig.load(run.path / "run.toml").to_toml())
    auto = f"AutoPeft{session.model.objective.auto_class.removeprefix('Auto')}"
    model = getattr(peft, auto).from_pretrained(str(run.path / "adapter"), **told).eval()
    total, count = 0.0, 0
    for index in session.data.test:
        row = session.data.tokens.batch(np.array([index]), session.model.tokenizer.pad_token_id)
        with torch.no_grad():
            loss = float(model(**row).loss)
        labels = 1 if objective == "classification" else int((row["labels"] != -100).sum())
        total, count = total + loss * labels, count + labels
    return total / count


def adapted(config: RunConfig) -> str:
    try:
        scale = open_session(config.to_toml()).model.scale
    except ConfigError:
        return "–"
    return ", ".join(sorted({name.rpartition(".")[2] for name in scale}))


def test_the_docs_have_a_row_per_family():
    assert list(kept()) == ROWS
    assert line(COLUMNS) in DOCS.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize(("family", "objective"), ROWS, ids=["-".join(row) for row in ROWS])
def test_a_row_is_what_runs_do(family: str, objective: str, made: Callable[..., RunConfig], tmp_path: Path):
    cells = [family, f"`{objective}`"]
    for targets in ("auto", "all-linear"):
        cells += [
            adapted(made(family, objective, targets, "none")),
            outcome(made, family, objective, targets, tmp_path / targets),
        ]
    found = line(tuple(cells))
    if os.environ.get("FEDLAB_WRITE_DOCS") == "1":
        lines = kept() | {(family, objective): found}
        text = DOCS.read_text(encoding="utf-8")
        head, _, rest = text.partition(line(COLUMNS))
        after = [one for one in rest.splitlines()[1:] if not one.startswith("|")]
        table = [line(COLUMNS), "|" + "---|" * len(COLUMNS), *(lines[row] for row in ROWS if row in lines)]
        DOCS.write_text(head + "\n".join([*table, *after]) + "\n", encoding="utf-8")
        return
    assert kept()[family, objective] == found, "FEDLAB_WRITE_DOCS=1 writes it"
