"""Every option of every strategy: the same call twice gives the same bits, and so does a run that goes on from a file.

The values are listed once, by key, in conformance_rows.py; a new key, a new choice of a key or a new key of a nested
table without a row there fails ``test_every_option_has_a_value``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import typing
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
import torch
from torch import Tensor

from fedlab.config import RunConfig
from fedlab.config.load import without_none
from fedlab.errors import ConfigError, FedlabError
from fedlab.lora import conformance
from fedlab.lora.average import weighted_mean
from fedlab.lora.conformance.cases import WEIGHTS, Subject, draw_state
from fedlab.lora.state import State, effective_delta, modules
from fedlab.run.checkpoint import POINTER, load_checkpoint, save_checkpoint
from fedlab.run.directory import RunDirectory
from strategies import CONTINUAL, STRATEGIES
from strategies.base import Round, ServerState, Strategy

RANK = 4


def sibling(name: str) -> Any:
    """A module beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rows = sibling("conformance_rows")


@dataclasses.dataclass(frozen=True)
class FakeBase:
    """Weights of any module, drawn from its name."""

    scale: dict[str, float] = dataclasses.field(default_factory=dict)

    def pristine(self, module: str) -> Tensor:
        raise AssertionError("no aggregation looks at the whole weight")

    def leading_inputs(self, module: str, rank: int) -> Tensor:
        g = torch.Generator().manual_seed(sum(map(ord, module)))
        return torch.linalg.qr(torch.randn(rank, rank, generator=g)).Q


def make(name: str, options: str = "") -> Strategy:
    text = f"[run]\nrounds=9\n[lora]\nrank={RANK}\nalpha=8\n[train]\nlr=1\nsteps=1\n"
    text += f"[strategy]\nname='{name}'\n" + "".join(f"{line}\n" for line in _keys(options))
    text += "[[tasks]]\nname='one'\n[[tasks]]\nname='two'\n" if name in CONTINUAL else ""
    more = ["lora.public='texts.txt'"] if "importance" in options else []
    return STRATEGIES[name](RunConfig.parse(text, more), FakeBase())


def _keys(options: str) -> list[str]:
    """``a=1, b={c=2, d=3}`` as one line per key."""
    lines, depth, start = [], 0, 0
    for i, letter in enumerate(options):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            lines.append(options[start:i].strip())
            start = i + 1
    return [line for line in [*lines, options[start:].strip()] if line]


def every_option() -> list[tuple[str, str]]:
    found = []
    for name, strategy in STRATEGIES.items():
        found.append((name, ""))
        for key in strategy.Options.model_fields:
            found += [(name, f"{key}={value}{rows.TOGETHER.get(key, '')}") for value in rows.VALUES.get(key, [])]
        found += [(name, options) for options in rows.MORE.get(name, [])]
    return found


ROWS = [row for row in every_option() if row not in rows.REFUSED]
each_row = pytest.mark.parametrize(("name", "options"), ROWS, ids=[" ".join(row).strip() for row in ROWS])


# --- the list is complete


def nested(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """The models in an annotation such as ``Robust | None``."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in nested(part)]


def choices(annotation: Any) -> set[Any]:
    """What a Literal allows; both values of a flag."""
    if annotation is bool:
        return {True, False}
    if typing.get_origin(annotation) is Literal:
        return set(typing.get_args(annotation))
    return {value for part in typing.get_args(annotation) for value in choices(part)}


def uncovered(model: type[pydantic.BaseModel], given: list[dict[str, Any]], path: str) -> list[str]:
    """Keys that no row sets to something else than the default, and choices that no row makes."""
    missing = []
    for key, field in model.model_fields.items():
        values = [row[key] for row in given if key in row]
        tried = [value for value in values if field.is_required() or value != field.default]
        if inner := nested(field.annotation):
            missing += [] if values else [f"{path}{key}"]
            missing += [m for each in inner for m in uncovered(each, values, f"{path}{key}.")]
        elif allowed := choices(field.annotation):
            missing += [f"{path}{key} = {value!r}" for value in allowed - {field.default, *tried}]
        elif not tried:
            missing.append(f"{path}{key}")
    return missing


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_option_has_a_value(name: str):
    model = STRATEGIES[name].Options
    given = [make(name, options).config.strategy.options for other, options in ROWS if other == name]
    refused = [options for other, options in rows.REFUSED if other == name]
    parsed = [RunConfig.parse(_text(options)).strategy.options for options in refused]
    assert uncovered(model, given + parsed, "") == []
    assert all(key in rows.VALUES for key in model.model_fields)


def _text(options: str) -> str:
    return "[run]\nrounds=1\n[lora]\nrank=1\nalpha=1\n[train]\nlr=1\nsteps=1\n[strategy]\n" + "\n".join(_keys(options))


def test_the_list_of_missing_values_finds_them():
    class Inner(pydantic.BaseModel):
        a: int
        b: Literal["x", "y"] = "x"

    class Outer(pydantic.BaseModel):
        inner: Inner | None = None
        flag: bool = False
        number: float = 1.0

    assert uncovered(Outer, [], "") == ["inner", "inner.a", "inner.b = 'y'", "flag = True", "number"]
    full = [{"inner": {"a": 1, "b": "y"}}, {"flag": True, "number": 2.0}]
    assert uncovered(Outer, full, "") == []


@pytest.mark.parametrize(("name", "options"), sorted(rows.REFUSED))
def test_what_cannot_work_is_refused(name: str, options: str):
    with pytest.raises(FedlabError):
        make(name, options)


# --- the properties

MEMORY = ("same call twice", "nothing in place", "save, load, go on", "order of replies")


@cache
def report(name: str, options: str) -> conformance.Report:
    return conformance.check(
        make(name, options),
        promise="mean of products",  # not asked about here
        fresh=lambda: make(name, options),
        only=MEMORY,
        title=f"{name} {options}",
    )


@each_row
def test_same_call_same_bits_and_nothing_kept_in_between(name: str, options: str):
    report(name, options).require()


@each_row
def test_a_checkpoint_holds_all_that_a_strategy_needs(name: str, options: str, tmp_path: Path):
    """Three rounds in a row, and a new process that goes on after the second from what the checkpoint holds."""
    whole, cut = make(name, options), make(name, options)
    directory = RunDirectory.create(whole.config, tmp_path / "run")
    state = draw_state()
    server_state = whole.init(state)
    for number in (1, 2):
        state, server_state = one_round(whole, state, server_state, number)
    save_checkpoint(directory, 2, state, server_state, {})
    found = load_checkpoint(directory)
    assert found is not None
    assert found[2].keys() == server_state.keys()
    wanted, again = one_round(whole, state, server_state, 3), one_round(cut, found[1], found[2], 3)
    for one, other in zip(wanted, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n], other[n]) for n in one)
    assert whole.client_ranks(wanted[1]) == cut.client_ranks(again[1])


def one_round(strategy: Strategy, state: State, server_state: ServerState, number: int) -> tuple[State, ServerState]:
    drawn = Subject(strategy, "", strategy.sent_names, lambda: strategy).case(state=state, round_number=number)
    return strategy.aggregate(drawn.state, server_state, drawn.updates, WEIGHTS, Round(number))


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if strategy.linear])
@pytest.mark.parametrize("options", ["", "server={optimizer='momentum', head_lr=0.5}"])
def test_what_says_that_it_is_linear_needs_the_mean_alone(name: str, options: str):
    """The clients' updates, or their mean as the one update: what shared noise and client-level DP rest on."""
    strategy = make(name, options)
    state, other = draw_state(), draw_state()
    server_state = other_state = strategy.init(state)
    for number in (1, 2, 3):
        drawn = Subject(strategy, "", strategy.sent_names, lambda: strategy).case(state=state, round_number=number)
        mean = {"everyone": weighted_mean(drawn.updates, WEIGHTS)}
        state, server_state = strategy.aggregate(state, server_state, drawn.updates, WEIGHTS, Round(number))
        other, other_state = strategy.aggregate(other, other_state, mean, {"everyone": 1.0}, Round(number))
        for module in modules(state):
            one, two = (effective_delta(s, module, 1.0) for s in (state, other))
            assert torch.allclose(one, two, atol=1e-4, rtol=1e-4)
        heads = [n for n in state if n.startswith("head.")]
        assert all(torch.allclose(state[n], other[n], atol=1e-5) for n in heads)


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if not strategy.linear])
def test_what_says_that_it_is_not_linear_needs_more(name: str):
    """Else it could be had under shared noise."""
    strategy = make(name)
    drawn = Subject(strategy, "", strategy.sent_names, lambda: strategy).case(state=draw_state(), round_number=1)
    mean = {"everyone": weighted_mean(drawn.updates, WEIGHTS)}
    one, _ = strategy.aggregate(drawn.state, strategy.init(drawn.state), drawn.updates, WEIGHTS, Round(1))
    two, _ = strategy.aggregate(drawn.state, strategy.init(drawn.state), mean, {"everyone": 1.0}, Round(1))
    gaps = [float((effective_delta(one, m, 1.0) - effective_delta(two, m, 1.0)).norm()) for m in modules(one)]
    assert max(gaps) > 1e-3


@each_row
def test_a_resolved_configuration_says_every_key_and_means_the_same(name: str, options: str):
    strategy = make(name, options)
    resolved = type(strategy).resolved(strategy.config)
    again = RunConfig.parse(resolved.to_toml())
    assert type(strategy)(again, FakeBase()).options == strategy.options
    own = without_none(strategy.options.model_dump(mode="json"))
    assert again.strategy.options.keys() == own.keys()
    assert (again.gram is not None) == strategy.reads_inputs


def test_a_checkpoint_of_an_earlier_edition_is_refused_in_one_line(tmp_path: Path):
    strategy = make("fedavg")
    directory = RunDirectory.create(strategy.config, tmp_path / "run")
    save_checkpoint(directory, 1, draw_state(), {}, {})
    pointer = directory.path / POINTER
    pointer.write_text(pointer.read_text().replace('"edition": 2, ', ""))
    with pytest.raises(ConfigError, match="another edition"):
        load_checkpoint(directory)
