"""A client that is asked for something else than it signed computes no gradient and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

import clients.train
from clients.account import ClientAccount, code_versions
from clients.train import train_message
from fedlab.config import RunConfig
from fedlab.errors import FedlabError
from fedlab.models.adapters import initial_state
from fedlab.privacy.ledger.ledger import parse_lines
from fedlab.session import open_session

Change = Callable[[dict], None]


@pytest.fixture
def ask(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RecordDict]:
    """Sign a plan under ``tiny_toml``, then ask for a round under other settings."""
    trained: list[str] = []
    real = clients.train.train_client
    monkeypatch.setattr(clients.train, "train_client", lambda *a, **k: trained.append(a[2]) or real(*a, **k))
    node = {"client": "client-0", "ledger": str(tmp_path)}

    def order(config: RunConfig, **values: object) -> ConfigRecord:
        common = {
            "clients": ["client-0"],
            "config": config.to_toml(),
            "run": "a" * 32,
            "ledger": "/server/says",
            "parts": ["head", "lora_B"],
        }
        return ConfigRecord(
            {
                **common,
                "round": 1,
                "wire_dtype": "float32",
                "known": [0],
                "keep": [],
                "groups": [1],
                "personal": "",
                **values,
            }
        )

    def run(*overrides: str, budget: float | None = None, **values: object) -> RecordDict:
        signed = RunConfig.parse(tiny_toml)
        context = Context(1, 1, node | ({"budget-epsilon": budget} if budget else {}), RecordDict(), {})
        account = ClientAccount(open_session(signed.to_toml()), "client-0", order(signed), context)
        account.guard.plan(account.terms, code_versions())
        asked = open_session(RunConfig.parse(tiny_toml, overrides).to_toml())
        state = initial_state(asked.model, asked.config.lora, 0)
        names = [name for name in state if not name.endswith("lora_A")]
        content = {"state": ArrayRecord({n: Array(v.numpy()) for n, v in state.items()})}
        record = order(asked.config, **{"trained": names, "ranks": [asked.config.lora.rank], **values})
        reply = train_message(asked, ["client-0"], RecordDict({**content, "round": record}), context)
        reply.config_records["seen"] = ConfigRecord({"trained": trained})
        return reply

    return run


def test_whatever_breaks_before_the_charge_says_nothing_of_the_data_and_costs_nothing(
    ask: Callable[..., RecordDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for rank in (0, 5):
        reply = ask(ranks=[rank])
        assert "rank" in reason(reply)
        assert reply.config_records["seen"]["trained"] == []

    def breaks(self: ClientAccount, trained: list[str]) -> None:
        raise ValueError("the patient's name")

    monkeypatch.setattr(ClientAccount, "check_scope", breaks)
    reply = ask()
    assert "patient" not in reason(reply)

    def unmade(*args: object) -> ClientAccount:
        raise ValueError("the patient's name")

    monkeypatch.setattr(clients.train, "ClientAccount", unmade)
    assert "patient" not in reason(ask())
    kinds = [entry["type"] for entry in parse_lines((tmp_path / "client-0.jsonl").read_text())]
    assert "CHARGE" not in kinds


@pytest.mark.parametrize("groups", [[0, 1], [2], [1, 1], [-1, 2]])
def test_groups_that_are_not_the_cohort_are_refused(groups: list[int], ask: Callable[..., RecordDict]):
    with pytest.raises(FedlabError, match="do not add up"):
        ask(groups=groups)


def reason(reply: RecordDict) -> str:
    (text,) = reply.config_records["failures"]["reasons"]
    return str(text)


def test_what_was_signed_is_done(ask: Callable[..., RecordDict], tmp_path: Path):
    reply = ask()
    assert reply.config_records["failures"]["ids"] == []
    types = [e["type"] for e in parse_lines((tmp_path / "client-0.jsonl").read_text())]
    assert types == ["PLAN", "CHARGE", "COMMIT"], "in the client's own directory, not where the server says"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("privacy.sigma=0.3", "sigma: 0.3"),
        ("train.steps=9", "steps: 9"),
        ("privacy.clip=5.0", "clip = 5 was asked, 1 was signed"),
        ("train.batch_size=32", "q: 0.3"),
        ("privacy.noise=secure", "noise = secure"),
        ("privacy.delta=1e-7", "delta = 1e-07"),
        ("privacy.participations=2", "participations = 2"),
        ("data.limit=300", "was signed"),
        ("lora.rank=2", "scope"),
    ],
)
def test_another_plan_than_the_signed_one_is_refused_before_any_gradient(
    override: str, named: str, ask: Callable[..., RecordDict]
):
    reply = ask(override)
    assert reason(reply).startswith("plan-mismatch")
    assert named in reason(reply)
    assert reply.config_records["failures"]["refused"] == ["client-0"]
    assert reply.config_records["seen"]["trained"] == []
    assert len(reply.array_records["updates"]) == 0
    assert '"type":"REFUSE"' in reply.config_records["charges"]["lines"][0]


def test_tensors_outside_the_signed_scope_are_not_trained(ask: Callable[..., RecordDict], tiny_toml: str):
    everything = list(
        initial_state(open_session(RunConfig.parse(tiny_toml).to_toml()).model, RunConfig.parse(tiny_toml).lora, 0)
    )
    reply = ask(trained=everything)
    assert "lora_A was asked to be trained, which the signed scope does not cover" in reason(reply)
    assert reply.config_records["seen"]["trained"] == []


def test_a_node_of_one_client_keeps_its_own_budget(ask: Callable[..., RecordDict]):
    reply = ask(budget=0.5)
    assert reason(reply).startswith("budget-exhausted")
    assert reply.config_records["seen"]["trained"] == []


def test_error_texts_that_may_quote_data_stay_on_the_client(
    ask: Callable[..., RecordDict], monkeypatch: pytest.MonkeyPatch
):
    def quote(*_: object, **__: object) -> None:
        raise ValueError("patient 4711 has a NaN")

    monkeypatch.setattr(clients.train, "train_cohort", quote)
    reply = ask()
    assert "4711" not in reason(reply)
    assert '"type":"ABORT"' in reply.config_records["charges"]["lines"][0]
    assert "4711" not in reply.config_records["charges"]["lines"][0], "nor may the ledger carry it out"


def test_local_accuracy_is_refused_under_dp(tiny_toml: str, tmp_path: Path):
    import clients.app

    config = RunConfig.parse(tiny_toml)
    from fedlab.run.launch.local import LocalGrid

    grid = LocalGrid(clients.app.app, 1)
    record = ConfigRecord({"config": config.to_toml(), "clients": ["client-0"], "round": 1, "wire_dtype": "float32"})
    (reply,) = grid.send_and_receive(
        [Message(RecordDict({"round": record}), next(iter(grid.get_node_ids())), "evaluate")]
    )
    assert reply.has_error()
    assert "local accuracy is not covered by the noise" in reply.error.reason
