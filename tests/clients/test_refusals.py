"""A client that is asked for something else than it signed computes no gradient and says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import clients.train
from clients.account import ClientAccount
from clients.owner import own_owner
from clients.train import answer_train
from fedlab.config import RunConfig
from fedlab.config.client import ClientFile
from fedlab.models.adapters import initial_state
from fedlab.privacy.ledger.guard import Refusal
from fedlab.privacy.ledger.ledger import parse_lines
from fedlab.protocol import ProtocolError
from fedlab.protocol.fields import Failure
from fedlab.protocol.messages import ClientOrder, ClientReply, EvaluateRequest
from fedlab.session import open_session


@dataclass
class Asked:
    """What a client answered, and for whom anything was trained."""

    reply: ClientReply
    trained: list[str]

    @property
    def code(self) -> str:
        assert self.reply.failure is not None
        return self.reply.failure.code

    @property
    def refusal(self) -> str:
        """The reason of the ledger's last REFUSE line."""
        assert self.reply.lines is not None
        return str([e for e in parse_lines(self.reply.lines) if e["type"] == "REFUSE"][-1]["reason"])


@pytest.fixture
def ask(tiny_toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helpers: Any) -> Callable[..., Asked]:
    """Sign a plan under ``tiny_toml``, then ask for a round under other settings."""
    trained: list[str] = []
    real = clients.train.train_cohort
    monkeypatch.setattr(
        clients.train, "train_cohort", lambda *a, **k: trained.extend(m.client for m in a[2]) or real(*a, **k)
    )

    def run(*overrides: str, budget: float | None = None, **changes: object) -> Asked:
        signed = open_session(RunConfig.parse(tiny_toml).to_toml())
        account = ClientAccount(signed, helpers.owner_at(tmp_path, budget=budget), helpers.run_reference(signed))
        account.sign()
        asked = open_session(RunConfig.parse(tiny_toml, overrides).to_toml())
        request = helpers.train_request(asked, ["client-0"], **changes)
        reply = answer_train(helpers.own_node(asked, tmp_path, budget), request)
        return Asked(reply.clients[0], trained)

    return run


def test_whatever_breaks_before_the_charge_says_nothing_of_the_data_and_costs_nothing(
    ask: Callable[..., Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = ask(clients=(ClientOrder("client-0", 0, 5),))
    assert asked.code == "request"
    assert "rank" in (tmp_path / "log.txt").read_text()
    assert asked.trained == []

    def breaks(self: ClientAccount, trained: list[str]) -> None:
        raise ValueError("the patient's name")

    monkeypatch.setattr(ClientAccount, "check_scope", breaks)
    assert ask().code == "failed"

    def unmade(*args: object) -> ClientAccount:
        raise ValueError("the patient's name")

    monkeypatch.setattr(clients.train, "ClientAccount", unmade)
    assert ask().code == "failed"
    assert (tmp_path / "log.txt").read_text().count("ValueError: the patient's name") >= 2, "its owner's log has it"
    kinds = [entry["type"] for entry in parse_lines((tmp_path / "client-0.jsonl").read_text())]
    assert "CHARGE" not in kinds


@pytest.mark.parametrize("passes", [(2,), (1, 1), ()])
def test_passes_that_are_not_the_clients_are_refused(passes: tuple[int, ...], ask: Callable[..., Asked]):
    with pytest.raises(ProtocolError, match="do not add up"):
        ask(passes=passes)


def test_what_was_signed_is_done(ask: Callable[..., Asked], tmp_path: Path):
    asked = ask()
    assert asked.reply.failure is None
    assert asked.trained == ["client-0"]
    assert {release.name for release in asked.reply.releases} == {"update", "timing"}
    types = [e["type"] for e in parse_lines((tmp_path / "client-0.jsonl").read_text())]
    assert types == ["PLAN", "CHARGE", "COMMIT"]


def test_the_update_carries_the_event_that_was_charged(ask: Callable[..., Asked], tmp_path: Path):
    release = ask().reply.release("update")
    charge = parse_lines((tmp_path / "client-0.jsonl").read_text())[1]
    assert release is not None
    assert release.event is not None
    assert release.event.steps == charge["event"]["steps"] == 3
    assert release.event.sigma == float.fromhex(charge["event"]["sigma"])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("privacy.sigma=0.5", "sigma: 0.5"),
        ("train.steps=9", "steps: 9"),
        ("privacy.clip=5.0", "clip = 5 was asked, 1 was signed"),
        ("train.batch_size=32", "q: 0.3"),
        ("privacy.noise=secure", "noise = secure"),
        ("privacy.delta=1e-7", "delta = 1e-07"),
        ("privacy.participations=2", "participations = 2"),
        ("data.limit=300", "was signed"),
        ("lora.rank=2", "scope"),
        ("train.lr=0.1", "configuration"),
        ("privacy.share_metrics=true", "configuration"),
    ],
)
def test_another_plan_than_the_signed_one_is_refused_before_any_gradient(
    override: str, named: str, ask: Callable[..., Asked]
):
    asked = ask(override)
    assert asked.code == "plan-mismatch"
    assert named in asked.refusal
    assert asked.reply.failure is not None
    assert asked.reply.failure.refused
    assert asked.trained == []
    assert asked.reply.releases == ()
    assert asked.reply.lines is not None
    assert '"type":"REFUSE"' in asked.reply.lines


def test_tensors_outside_the_signed_scope_are_not_trained(ask: Callable[..., Asked], tiny_toml: str):
    config = RunConfig.parse(tiny_toml)
    everything = tuple(initial_state(open_session(config.to_toml()).model, config.lora, 0))
    asked = ask(trained=everything)
    assert asked.code == "plan-mismatch"
    assert "lora_A was asked to be trained, which the signed scope does not cover" in asked.refusal
    assert asked.trained == []


def test_an_owner_keeps_its_own_budget(ask: Callable[..., Asked]):
    asked = ask(budget=0.5)
    assert asked.code == "budget-exhausted"
    assert asked.trained == []


def test_an_owner_looks_for_its_own_in_its_own_file(tmp_path: Path):
    text = "[client]\nid = 'north'\n[data]\nsource = 'docstrings'\n[models.m]\n[policy]\nmin_sigma = 1.0\n"
    owners = own_owner(ClientFile.parse(text + "[budget]\nepsilon = 2.0", tmp_path), "a" * 32, open_session)
    owner, home = owners.one("north"), tmp_path / "north"
    assert (owner.places.ledgers, owner.places.store) == (home / "ledger", home / "bases")
    assert owner.places.personal == home / "personal" / ("a" * 32)
    assert owner.budget is not None
    assert owner.budget.epsilon == 2.0
    assert owners.present(["client-0", "client-1"]) == ["north"]
    with pytest.raises(ProtocolError, match="belongs to north; it was asked to act for client-0"):
        owners.one("client-0")


def test_error_texts_that_may_quote_data_stay_on_the_client(ask: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch):
    def quote(*_: object, **__: object) -> None:
        raise ValueError("patient Quillfeather has a NaN")

    monkeypatch.setattr(clients.train, "train_cohort", quote)
    asked = ask()
    assert asked.reply.failure == Failure("failed")
    assert asked.reply.lines is not None
    assert '"type":"ABORT"' in asked.reply.lines
    assert "Quillfeather" not in asked.reply.lines, "nor may the ledger carry it out"


def test_local_scores_are_refused_under_dp(tiny_toml: str, tmp_path: Path, helpers: Any):
    session = open_session(RunConfig.parse(tiny_toml).to_toml())
    owner = helpers.owner_at(tmp_path)
    ClientAccount(session, owner, helpers.run_reference(session)).sign()
    request = EvaluateRequest(helpers.run_reference(session), 1, ("client-0",), (), "float32", {})
    with pytest.raises(Refusal, match="local scores are not covered by the noise"):
        owner.admit(request, session.config)
