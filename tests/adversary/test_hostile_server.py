"""A server that sends a deployed client anything: nothing that depends on its data leaves without its charge."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

import clients.answer
import clients.own_session
from fedlab.config import RunConfig
from fedlab.config.client import ALWAYS, OWN, OwnData, ReleaseName
from fedlab.config.data import DataSection
from fedlab.errors import ConfigError
from fedlab.privacy.ledger.ledger import charged
from fedlab.privacy.release import PUBLIC

SUMS = ("prepare", "confirm", "unmask")
# Keys of [data] that are a simulation's, or that the server sets alone; a client's ``seed`` is its own.
SERVERS = {"clients", "partition", "min_client_size", "max_length", "test_fraction", "canaries", "seed"}
OFFICIAL = {"test_path", "test_split"}  # the server's own test file says it in a deployment
RULES_OFF = (
    {"unit": "none"},
    {"unit": "client", "sigma": 0.001, "clip": 1000.0, "noise": "secure"},
    {"unit": "client", "sigma": 1.0, "clip": 1.0},
)


def leaves(model: type[pydantic.BaseModel], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of a configuration, as a path."""
    for name, described in model.model_fields.items():
        inner = [a for a in (described.annotation, *typing.get_args(described.annotation)) if isinstance(a, type)]
        section = next((a for a in inner if issubclass(a, pydantic.BaseModel)), None)
        if section is not None and typing.get_origin(described.annotation) is not tuple:
            yield from leaves(section, (*before, name))
        yield (*before, name)


def others(value: Any, described: Any) -> Iterator[Any]:
    """Values that a key might have instead of its own."""
    for annotation in (described, *typing.get_args(described)):
        if typing.get_origin(annotation) is typing.Literal:
            yield from (choice for choice in typing.get_args(annotation) if choice != value)
        if annotation is bool:
            yield not value
        if annotation in (int, float):
            yield from ((value or 0) + 1, 2, 0.5, 1)
        if annotation is str:
            yield from (f"{value or ''}x", "x")
        if typing.get_origin(annotation) is tuple:
            yield from ([*(value or []), "x"], ["x"])
        if typing.get_origin(annotation) is dict:
            yield from ({"client-0": 1}, {"x": 1})


def changed(config: RunConfig, path: tuple[str, ...]) -> RunConfig | None:
    """The configuration with another value for one key; None where no other value makes a configuration."""
    tree = config.model_dump(mode="json", exclude_none=True)
    model: Any = RunConfig
    for name in path[:-1]:
        described = model.model_fields[name].annotation
        model = next(
            a
            for a in (described, *typing.get_args(described))
            if isinstance(a, type) and issubclass(a, pydantic.BaseModel)
        )
    place = tree
    for name in path[:-1]:
        place = place.setdefault(name, {})
    for value in others(place.get(path[-1]), model.model_fields[path[-1]].annotation):
        before = place.get(path[-1])
        place[path[-1]] = value
        try:
            found = RunConfig.model_validate(tree)
        except (pydantic.ValidationError, ConfigError):
            found = config
        if found.to_toml() != config.to_toml():
            return found
        place[path[-1]] = before
    return None


@pytest.fixture
def signed(server: Callable[..., Any], tiny_toml: str, helpers: Any) -> tuple[Any, RunConfig]:
    """A server whose run the client signed a plan for, and the configuration."""
    hostile, config = server(), helpers.config_of(tiny_toml)
    assert helpers.codes_of(hostile.send(helpers.describe(config))) == []
    assert hostile.kinds() == ["PLAN"]
    return hostile, config


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After a call of it, opening a model or data is an error of the test."""

    def opened(*_: object) -> None:
        raise AssertionError("data were opened for a request that is refused")

    def close() -> None:
        monkeypatch.setattr(clients.own_session.OwnSessions, "open", opened)

    return close


def test_an_honest_run_goes_through(signed: tuple[Any, RunConfig], helpers: Any):
    hostile, config = signed
    requests = helpers.requests_of(config, config)
    reply = hostile.send(requests["train"])
    assert [release.name for release in helpers.releases_of(reply)] == ["update", "timing"]
    assert hostile.kinds() == ["PLAN", "CHARGE", "COMMIT"]
    assert helpers.codes_of(hostile.send(requests["receipts"])) == []
    for kind in ("evaluate", *SUMS, "gram"):
        assert helpers.codes_of(hostile.send(requests[kind])) in (["policy"], [])
    assert len(hostile.outputs) == 1


def test_every_key_changed_after_the_plan_is_refused_in_every_request_before_data_are_opened(
    signed: tuple[Any, RunConfig], helpers: Any, closed: Callable[[], None]
):
    hostile, config = signed
    variants = {path: found for path in leaves(RunConfig) if (found := changed(config, path)) is not None}
    assert len(variants) > 70, "most keys can be changed alone"
    for name, privacy in enumerate(RULES_OFF):
        tree = config.model_dump(mode="json", exclude_none=True) | {"privacy": privacy}
        variants["privacy", str(name)] = RunConfig.model_validate(tree)
    kinds = list(helpers.requests_of(config, config))
    asked = {path: helpers.requests_of(found, config) for path, found in variants.items()}
    closed()
    for path, requests in asked.items():
        for kind in kinds:
            reply = hostile.send(requests[kind])
            assert helpers.releases_of(reply) == [], f"{kind} with another {'.'.join(path)}"
            assert set(helpers.codes_of(reply)) <= {"plan-mismatch"}, f"{kind} with another {'.'.join(path)}"
    assert hostile.outputs == set()
    assert set(hostile.kinds()) == {"PLAN", "REFUSE"}
    reply = hostile.send(helpers.describe(config))
    assert helpers.codes_of(reply) == ["failed"], "the honest configuration is admitted, and would be opened"


@pytest.mark.parametrize(
    "overrides",
    [
        ["privacy={unit='none'}"],
        ["privacy={unit='client', sigma=1.0, clip=1.0, noise='secure'}"],
        ["privacy.noise=seeded"],
        ["privacy.sigma=0.4"],
        ["privacy={unit='example', epsilon=31.0, clip=1.0, noise='secure'}"],
        ["privacy.delta=2e-5"],
        ["privacy.clip=2.5"],
        ["privacy.share_metrics=true"],
        ["train.batch_size=1", "train.steps=1"],
        ["train.batch_size=7"],
        ["objective.labels=[]"],
        ["model.name=somebody/else"],
        ["run.rounds=5000"],
    ],
)
def test_what_the_policy_does_not_allow_is_refused_for_a_new_run_too(
    overrides: list[str], signed: tuple[Any, RunConfig], tiny_toml: str, helpers: Any, closed: Callable[[], None]
):
    hostile, config = signed
    asked = helpers.requests_of(helpers.config_of(tiny_toml, *overrides), config, helpers.OTHER_RUN)
    if overrides != ["run.rounds=5000"]:  # how much ε that is depends on the number of records
        closed()
    for kind, request in asked.items():
        reply = hostile.send(request)
        assert not [r for r in helpers.releases_of(reply) if r.name != "size"], kind
        assert helpers.codes_of(reply), kind
    last = hostile.entries[-1]
    assert (last["type"], last["run"]) == ("REFUSE", helpers.OTHER_RUN)
    assert "policy" in {entry["kind"] for entry in hostile.entries if entry["type"] == "REFUSE"}
    assert charged(hostile.entries) == []


def test_parts_that_the_policy_does_not_allow_are_not_trained(server: Callable[..., Any], tiny_toml: str, helpers: Any):
    hostile, config = server(), helpers.config_of(tiny_toml)
    asked = helpers.describe(config)
    run = dataclasses.replace(asked.run, parts=("lora_A", "lora_B"))
    assert helpers.codes_of(hostile.send(dataclasses.replace(asked, run=run))) == ["policy"]
    assert hostile.entries == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"[policy]": "[no_policy]"}, "unknown key no_policy"),
        ({"[budget]\nepsilon = 40.0": ""}, r"\[budget\] is missing"),
        ({'"client-0"': '"../../victim"'}, "is no identifier"),
        ({'"client-0"': '"server"'}, "is no identifier"),
    ],
)
def test_without_a_policy_a_budget_or_a_name_no_client_is_started(
    changes: dict[str, str], said: str, server: Callable[..., Any]
):
    with pytest.raises(ConfigError, match=said):
        server(changes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.label=site"],
        ["data.text=topic"],
        ["data.path=/etc/hostname"],
        ["data.source=docstrings", "data.path=/etc"],
        ["data.source=hub", "data.path=somebody/else"],
        ["data.partition={kind='natural', column='site'}", "data.clients=5"],
        ["data.test_path=/etc/passwd", "data.on_bad_row=drop"],
    ],
)
def test_no_place_that_the_server_names_is_read(
    overrides: list[str], server: Callable[..., Any], tiny_toml: str, helpers: Any, monkeypatch: pytest.MonkeyPatch
):
    hostile, config = server(), helpers.config_of(tiny_toml)
    read: list[DataSection] = []
    original = clients.own_session.own_records

    def reads(data: DataSection, *rest: Any) -> Any:
        read.append(data)
        return original(data, *rest)

    monkeypatch.setattr(clients.own_session, "own_records", reads)
    asked = helpers.requests_of(helpers.config_of(tiny_toml, *overrides), config)
    assert helpers.codes_of(hostile.send(asked["describe"])) == []
    reply = hostile.send(asked["train"])
    assert [release.name for release in helpers.releases_of(reply)] == ["update", "timing"]
    assert read == [hostile.file.data.section(config.data.max_length)]


def message_changes(request: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The request with one field of it, or of what is in it, changed; named by the field."""
    for described in dataclasses.fields(request):
        value = getattr(request, described.name)
        here = (*path, described.name)
        for other in other_fields(described.name, value):
            yield ".".join(here), dataclasses.replace(request, **{described.name: other})
        if dataclasses.is_dataclass(value):
            for name, inner in message_changes(value, here):
                yield name, dataclasses.replace(request, **{described.name: inner})
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for name, inner in message_changes(value[0], here):
                yield name, dataclasses.replace(request, **{described.name: (inner, *value[1:])})


def other_fields(name: str, value: Any) -> Iterator[Any]:
    """Other values for one field of a message."""
    if isinstance(value, dict) and value and isinstance(next(iter(value.values())), np.ndarray):
        yield {key: array + 1 for key, array in value.items()}
        yield {key: array for key, array in value.items() if key != next(iter(value))}
        yield {}
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, max(1, value - 1))
    elif isinstance(value, str):
        yield {"run": "c" * 32, "configuration": "c" * 64, "basis": "c" * 64, "wire": "bfloat16"}.get(name, f"{value}x")
    elif isinstance(value, tuple):
        yield from (value[:-1], (*value, *value[:1]))


@pytest.mark.parametrize("kind", ["train", "evaluate", "receipts", "prepare", "confirm", "unmask", "gram"])
def test_every_field_of_every_request_changed_leaves_one_output_per_charge(
    kind: str, signed: tuple[Any, RunConfig], helpers: Any
):
    hostile, config = signed
    requests = helpers.requests_of(config, config)
    first = hostile.send(requests["train"])
    tried = set()
    for name, request in message_changes(requests[kind]):
        tried.add(name)
        hostile.send(request)  # holds what leaves against the ledger
    assert {f.name for f in dataclasses.fields(requests[kind])} >= {name.partition(".")[0] for name in tried}
    assert len(tried) >= 5 or kind in SUMS
    again = hostile.send(requests["train"])
    if helpers.codes_of(again) != ["repeated"]:  # a later round was asked for among the changes
        assert helpers.releases_of(again)[0].arrays.keys() == helpers.releases_of(first)[0].arrays.keys()


def test_a_round_asked_again_gives_the_same_bytes_for_one_charge(signed: tuple[Any, RunConfig], helpers: Any):
    hostile, config = signed
    request = helpers.requests_of(config, config)["train"]
    first = hostile.send(request)
    for _ in range(3):
        again = hostile.send(request)
        assert [r.name for r in helpers.releases_of(again)] == ["update", "timing"]
        for one, other in zip(helpers.releases_of(first), helpers.releases_of(again), strict=True):
            assert one.numbers == other.numbers
            assert one.event == other.event
            assert all(np.array_equal(value, other.arrays[name]) for name, value in one.arrays.items())
    assert hostile.kinds() == ["PLAN", "CHARGE", "COMMIT"]
    assert len(hostile.outputs) == 1


def test_a_run_that_was_closed_keeps_no_answer_and_gives_none_again(signed: tuple[Any, RunConfig], helpers: Any):
    hostile, config = signed
    requests = helpers.requests_of(config, config)
    hostile.send(requests["train"])
    assert list((hostile.home / "ledger" / "kept").iterdir())
    closing = dataclasses.replace(requests["receipts"], closing=True)
    for _ in range(2):
        assert helpers.codes_of(hostile.send(closing)) == []
        assert hostile.kinds() == ["PLAN", "CHARGE", "COMMIT", "CLOSE"]
        assert not list((hostile.home / "ledger" / "kept").iterdir())
    assert helpers.codes_of(hostile.send(requests["train"])) == ["repeated"]
    assert len(hostile.outputs) == 1
    assert helpers.codes_of(hostile.send(dataclasses.replace(requests["train"], round=2))) == []
    assert len(hostile.outputs) == 2, "a server that goes on is charged"
    hostile.send(closing)
    assert hostile.kinds()[3:] == ["CLOSE", "REFUSE", "CHARGE", "COMMIT", "CLOSE"]


@pytest.mark.parametrize("change", ["state", "wire", "trained", "rank"])
def test_another_request_under_the_same_round_is_refused(change: str, signed: tuple[Any, RunConfig], helpers: Any):
    hostile, config = signed
    request = helpers.requests_of(config, config)["train"]
    hostile.send(request)
    (order,) = request.clients
    other = {
        "state": {"state": {name: array + np.float32(0.5) for name, array in request.state.items()}},
        "wire": {"wire": "bfloat16", "state": helpers.to_wire(helpers.from_wire(request.state), "bfloat16")},
        "trained": {"trained": request.trained[:1]},
        "rank": {"clients": (dataclasses.replace(order, rank=2),)},
    }[change]
    reply = hostile.send(dataclasses.replace(request, **other))
    assert helpers.codes_of(reply) == ["repeated"]
    assert hostile.kinds() == ["PLAN", "CHARGE", "COMMIT", "REFUSE"]
    assert len(hostile.outputs) == 1
    hostile.send(dataclasses.replace(request, round=2))
    assert helpers.codes_of(hostile.send(request)) == ["repeated"], "the answer was kept until the next round"
    assert len(hostile.outputs) == 2


def test_a_kept_answer_that_was_damaged_is_not_sent(signed: tuple[Any, RunConfig], helpers: Any):
    hostile, config = signed
    request = helpers.requests_of(config, config)["train"]
    hostile.send(request)
    (kept,) = (hostile.home / "ledger" / "kept").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    assert helpers.codes_of(hostile.send(request)) == ["repeated"]


@pytest.mark.parametrize("name", ["x/../../../../victim/tls", "../../victim/planted", "A" * 32, "", "a" * 31 + "\n"])
def test_no_id_that_came_becomes_a_path(name: str, signed: tuple[Any, RunConfig], tmp_path: Path, helpers: Any):
    hostile, config = signed
    before = sorted(tmp_path.rglob("*"))
    for kind, request in helpers.requests_of(config, config).items():
        named = dataclasses.replace(request, run=dataclasses.replace(request.run, run=name))
        assert helpers.codes_of(hostile.send(named)) == ["request"], kind
    request = helpers.requests_of(config, config)["train"]
    other = dataclasses.replace(request.clients[0], client=name)
    assert helpers.codes_of(hostile.send(dataclasses.replace(request, clients=(other,)))) == ["request"]
    assert sorted(tmp_path.rglob("*")) == sorted({*before, tmp_path / "ledger" / "log.txt"})


def test_a_malformed_row_is_not_quoted(
    server: Callable[..., Any], tiny_toml: str, tiny_data: Path, tmp_path: Path, helpers: Any
):
    path = tmp_path / "notes.csv"
    rows = "".join(f"note {i},{helpers.LABELS[i % 3]}\n" for i in range(200))
    path.write_text(f"text,topic\n{rows}patient Quillfeather,ocean,surplus\n")
    hostile = server({str(tiny_data): str(path)})
    config = helpers.config_of(tiny_toml, f"data.path={path}")
    assert helpers.codes_of(hostile.send(helpers.describe(config))) == ["configuration"]
    assert "line 202: 3 field(s), but the header has 2" in hostile.log, "its owner's log says what is wrong"
    assert "Quillfeather" not in hostile.log
    assert not any(b"Quillfeather" in sent for sent in hostile.bytes)


@pytest.mark.parametrize("kind", ["describe", "train", "evaluate", "receipts", "prepare", "confirm", "unmask", "gram"])
@pytest.mark.parametrize("error", [KeyError, ValueError, ConfigError, SystemError])
def test_no_text_of_an_exception_leaves(
    kind: str, error: type[Exception], signed: tuple[Any, RunConfig], helpers: Any, monkeypatch: pytest.MonkeyPatch
):
    hostile, config = signed
    request = helpers.requests_of(config, config)[kind]

    def breaks(*_: object, **__: object) -> None:
        raise error("patient Quillfeather has a NaN")

    monkeypatch.setitem(clients.answer.ANSWERS, kind, breaks)
    reply = hostile.send(request)
    if kind not in ("evaluate", *SUMS, "gram"):  # those are not even admitted
        assert helpers.codes_of(reply) in (["failed"], ["configuration"])
        assert "Quillfeather" in hostile.log
    assert not any(b"Quillfeather" in sent for sent in hostile.bytes)
    assert not any("Quillfeather" in str(entry) for entry in hostile.entries)


def test_bytes_that_are_no_request_are_answered_with_a_code(signed: tuple[Any, RunConfig], helpers: Any):
    hostile, config = signed
    frame = helpers.encode("train", helpers.requests_of(config, config)["train"])
    for broken in (
        dataclasses.replace(frame, kind="pickle"),
        dataclasses.replace(frame, header=b"{"),
        dataclasses.replace(frame, body=frame.body[:-8]),
    ):
        assert helpers.codes_of(hostile.send_frame(broken)) == ["request"]
    assert hostile.kinds() == ["PLAN"]


def test_label_names_are_those_of_the_configuration_whatever_a_client_has(
    server: Callable[..., Any], tiny_toml: str, helpers: Any
):
    hostile = server()
    config = helpers.config_of(tiny_toml, 'objective.labels=["fruit", "ocean", "wood"]')  # as many, but others
    assert helpers.codes_of(hostile.send(helpers.describe(config))) == ["labels"]
    assert hostile.entries == []
    config = helpers.config_of(tiny_toml, 'objective.labels=["ocean", "wood", "metal", "fruit"]')
    assert helpers.codes_of(hostile.send(helpers.describe(config))) == []
    corpus = hostile.desk.owners(helpers.describe(config)).open(config.to_toml()).data
    assert set(np.unique(corpus.tokens.labels).tolist()) == {0, 2, 3}


def test_every_key_of_data_is_the_clients_own_or_names_no_place():
    assert set(DataSection.model_fields) == SERVERS | OFFICIAL | set(OWN)
    assert set(OwnData.model_fields) == {*OWN, "held_out", "seed"}


def test_every_public_release_can_be_named_in_a_policy():
    assert set(typing.get_args(ReleaseName)) == set(PUBLIC)
    assert set(ALWAYS) == {"size", "timing", "failure"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_sigma = 0.5\nmax_epsilon = 30.0": ""}, "needs a limit"),
        ({"min_sigma": 'unit = "none"\nmin_sigma'}, 'name "update" in releases'),
        ({"min_sigma": 'noise = "none"\nmin_sigma'}, "noise"),
        ({"min_sigma": 'releases = ["size"]\nmin_sigma'}, "timing, failure is missing"),
        ({"min_sigma": "least_sigma"}, "unknown key"),
    ],
)
def test_a_policy_that_says_too_little_is_refused(changes: dict[str, str], said: str, server: Callable[..., Any]):
    with pytest.raises(ConfigError, match=said):
        server(changes)
